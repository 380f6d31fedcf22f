/** Helpers for elements, keys and the clipboard. */

const COPIED = 2_000 // milliseconds for which a button says that it has copied

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

/** Whether a key belongs to an input method. In Safari the key that ends a composition comes after its end, with this code. @param {KeyboardEvent} event */
export const isComposing = (event) => event.isComposing || event.keyCode === 229

/**
 * Copy text to the clipboard.
 * @param {string} text
 * @param {(copied: boolean) => void} tell Called with true, and soon after with false. The button says in between that it has copied.
 */
export async function copy(text, tell) {
  try {
    await navigator.clipboard.writeText(text)
  } catch { // a page without access to the Clipboard API
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
  tell(true)
  setTimeout(() => tell(false), COPIED)
}
