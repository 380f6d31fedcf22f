/** Export of a conversation to a file, as Markdown or JSON. */

import { labelOf } from './attachments.js'
import { find } from './dom.js'
import { messageOf, referenceOf } from './errors.js'
import { showNotice } from './notice.js'
import { dateOf } from './times.js'
import { describePartial } from './wording.js'

/** @typedef {import('./client.js').Chat} Chat */
/** @typedef {Record<string, any> & {type: string}} Block A block of any type, with the values that the server sends. */
/** @typedef {import('./client.js').Message} Message */
/** @typedef {import('./client.js').ReplyError} ReplyError */
/** @typedef {{id: string, title: string}} Conversation */

const ATTEMPTS = 3 // to load a page of the history
const SLOW = 1000 // milliseconds after which the page says that it loads
const button = find(document, '#export', HTMLButtonElement)
const dialog = find(document, '#export-dialog', HTMLDialogElement)
let isRunning = false

/** Let the button export the conversation on the page. @param {Chat} chat @param {() => Conversation | undefined} shown */
export function offerExport(chat, shown) {
  button.addEventListener('click', () => {
    dialog.returnValue = ''
    dialog.showModal()
  })
  dialog.addEventListener('close', () => {
    const conversation = shown()
    const format = dialog.returnValue
    if (conversation && (format === 'md' || format === 'json')) start(chat, conversation, format)
  })
}

/** @param {Chat} chat @param {Conversation} conversation @param {'md' | 'json'} format */
async function start(chat, conversation, format) {
  if (isRunning) return
  isRunning = true
  const isLost = chat.state !== 'open' && chat.state !== 'idle'
  const telling = setTimeout(() => {
    showNotice(isLost ? 'The export begins when the connection is back.' : 'The export loads all messages…')
  }, isLost ? 0 : SLOW)
  try {
    const messages = await loadAll(chat, conversation.id)
    showNotice('')
    save(conversation, messages, format)
  } catch (error) {
    showNotice(`There is no file, because a part of the conversation could not be loaded. ${messageOf(error)}`, () => {
      showNotice('')
      start(chat, conversation, format)
    }, referenceOf(error))
  } finally {
    clearTimeout(telling)
    isRunning = false
  }
}

/** @param {Chat} chat @param {string} id */
async function loadAll(chat, id) {
  /** @type {Message[][]} */
  const pages = []
  /** @type {number | undefined} */
  let before = Number.MAX_SAFE_INTEGER
  while (before !== undefined) {
    const page = await load(chat, id, before)
    pages.unshift(page.messages)
    before = page.before
  }
  return pages.flat()
}

/** Load a page, again if the server is at a limit. @param {Chat} chat @param {string} id @param {number} before */
async function load(chat, id, before) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await chat.open(id, { before })
    } catch (error) {
      const { code, retryAfter } = /** @type {Partial<ReplyError>} */ (error)
      if (code !== 'limit' || retryAfter === undefined || attempt === ATTEMPTS) throw error
      await new Promise((resolve) => { setTimeout(resolve, retryAfter * 1000) })
    }
  }
}

/** @param {Conversation} conversation @param {Message[]} messages @param {'md' | 'json'} format */
function save({ id, title }, messages, format) {
  const text = format === 'md' ? toMarkdown(title, messages) : `${JSON.stringify({ conversation: id, title, messages }, undefined, 2)}\n`
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob([text], { type: format === 'md' ? 'text/markdown' : 'application/json' }))
  link.download = `${fileName(title)}.${format}`
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000)
}

/** @param {string} title @param {Message[]} messages */
export function toMarkdown(title, messages) {
  /** @type {string[]} */
  const sources = []
  const parts = messages.map(({ role, content, blocks = [{ type: 'text', text: content }], partial, began, ended }) => {
    const said = toParts(blocks, sources)
    if (partial) said.push(`*${describePartial(partial)}*`)
    const time = role === 'user' ? began : ended
    if (time !== undefined) said.unshift(`*${dateOf(time)}*`)
    return `## ${role === 'user' ? 'You' : 'Reply'}\n\n${said.join('\n\n')}`
  })
  const notes = sources.map((source, place) => `[^${place + 1}]: ${source}`)
  return `${[`# ${title}`, ...parts, ...notes].join('\n\n')}\n`
}

/** @param {Block[]} blocks @param {string[]} sources The sources that citations name; new ones are added. */
function toParts(blocks, sources) {
  /** @type {string[]} */
  const parts = []
  let continues = false // a text with citations is several blocks
  for (const block of blocks) {
    const isText = block.type === 'text'
    const part = isText ? block.text + (block.citations ?? []).map((/** @type {any} */ each) => toNote(each, sources)).join('') : toPart(block)
    if (isText && continues) parts.push(parts.pop() + part)
    else if (part) parts.push(part)
    continues = isText
  }
  return parts
}

/** Return the mark of a footnote. @param {any} citation @param {string[]} sources */
function toNote({ url, title, document_title: document, cited_text: quote = '' }, sources) {
  const name = title ?? document ?? url ?? quote
  const source = url ? `[${name.replace(/[[\]]/g, '\\$&')}](<${url}>)` : name
  const place = sources.indexOf(source)
  return `[^${place < 0 ? sources.push(source) : place + 1}]`
}

/** @param {Block} block */
function toPart(block) {
  const { type, ...rest } = block
  if (type === 'thinking' || type === 'redacted_thinking') return ''
  const label = labelOf(block)
  if (type === 'image' || type === 'document') {
    const { url } = rest.source ?? {}
    return url ? `${type === 'image' ? '!' : ''}[${label}](<${url}>)` : `*${label}*`
  }
  const json = JSON.stringify(rest.input ?? rest.content ?? rest, undefined, 2)
  const fence = '`'.repeat(Math.max(3, ...[...json.matchAll(/`+/g)].map(([{ length }]) => length + 1)))
  return `*${label}*\n\n${fence}json\n${json}\n${fence}`
}

/** @param {string} title */
function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, ' ').trim().slice(0, 60) || 'conversation'
}
