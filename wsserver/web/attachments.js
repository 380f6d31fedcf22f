/** The blocks of a prompt besides its text, such as images and documents. Other clients send them. */

/** @typedef {Record<string, any> & {type: string}} Block A block of any type, with the values that the server sends. */
/** @typedef {string | Block[]} Content */

const NAMES = new Map(Object.entries({ image: 'Image', document: 'Document', tool_use: 'Tool call', tool_result: 'Tool result' }))
const IMAGE_TYPE = /^image\/(png|jpeg|gif|webp)$/

/** @param {Content} content */
export const textOf = (content) => typeof content === 'string' ? content : content.map(({ type, text }) => (type === 'text' ? text : '')).join('')

/** @param {Content} content @returns {Block[]} */
export const attachmentsOf = (content) => typeof content === 'string' ? [] : content.filter(({ type }) => type !== 'text')

/** Whether a person can write another text for a prompt: it answers no tool. @param {Content} content */
export const isEditable = (content) => attachmentsOf(content).every(({ type }) => type === 'image' || type === 'document')

/** Put another text in place of the text of a prompt. @param {Content} content @param {string} text @returns {Content} */
export function withText(content, text) {
  if (typeof content === 'string') return text
  const place = content.findIndex(({ type }) => type === 'text')
  const others = (/** @type {Block[]} */ blocks) => blocks.filter(({ type }) => type !== 'text')
  return place < 0 ? [...content, { type: 'text', text }] : [...others(content.slice(0, place)), { type: 'text', text }, ...others(content.slice(place))]
}

/** Return what a block is, such as “Document: Minutes”. @param {Block} block */
export function labelOf({ type, title, name = title }) {
  const kind = NAMES.get(type) ?? type.replaceAll('_', ' ')
  return typeof name === 'string' && name ? `${kind}: ${name}` : kind
}

/** Show the attachments of a prompt as the items of a list. @param {HTMLElement} list @param {Block[]} blocks */
export function showAttachments(list, blocks) {
  list.replaceChildren(...blocks.map((block) => {
    const item = document.createElement('li')
    item.append(toElement(block))
    return item
  }))
  list.hidden = !blocks.length
}

/** @param {Block} block @returns {HTMLElement | string} */
function toElement(block) {
  const { type, source } = block
  const label = labelOf(block)
  if (type === 'image' && IMAGE_TYPE.test(source?.media_type) && isBase64(source.data)) {
    return Object.assign(document.createElement('img'), { src: `data:${source.media_type};base64,${source.data}`, alt: label })
  }
  if (typeof source?.url !== 'string' || !/^https?:\/\//i.test(source.url)) return label
  return Object.assign(document.createElement('a'), { href: source.url, target: '_blank', rel: 'noopener noreferrer', textContent: label, title: source.url })
}

/** @param {unknown} data */
function isBase64(data) {
  try {
    return typeof data === 'string' && atob(data) !== ''
  } catch {
    return false
  }
}
