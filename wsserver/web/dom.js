/**
 * Return the element for a selector. Throws if the page has none of this type.
 * @template {Element} T
 * @param {ParentNode} root
 * @param {string} selector
 * @param {new () => T} type
 * @returns {T}
 */
export function find(root, selector, type) {
  const found = root.querySelector(selector)
  if (!(found instanceof type)) throw new Error(`The page has no ${selector}`)
  return found
}

/** Return a copy of a template's element. @param {string} id @returns {HTMLElement} */
export function cloneTemplate(id) {
  const { content } = find(document, `template#${id}`, HTMLTemplateElement)
  return /** @type {HTMLElement} */ (find(content, '*', HTMLElement).cloneNode(true))
}

/**
 * Copy text to the clipboard, also in a page without access to the Clipboard API.
 * @param {string} text
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text)
  } catch {
    const area = document.createElement('textarea')
    area.value = text
    area.className = 'visually-hidden'
    document.body.append(area)
    const before = document.activeElement
    area.select()
    document.execCommand('copy')
    area.remove()
    if (before instanceof HTMLElement) before.focus()
  }
}
