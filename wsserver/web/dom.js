/**
 * Find a part of the page that has to be there.
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

/** A copy of what a template holds. @param {string} id @returns {HTMLElement} */
export function copyOf(id) {
  const { content } = find(document, `template#${id}`, HTMLTemplateElement)
  return /** @type {HTMLElement} */ (find(content, '*', HTMLElement).cloneNode(true))
}

/**
 * Put text on the clipboard, also where the page is not one that may use the API for it.
 * @param {string} text
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text)
  } catch {
    const area = document.createElement('textarea')
    area.value = text
    area.className = 'unseen'
    document.body.append(area)
    const before = document.activeElement
    area.select()
    document.execCommand('copy')
    area.remove()
    if (before instanceof HTMLElement) before.focus()
  }
}
