/** The notice above the message box. */

import { find } from './dom.js'
import { messageOf, referenceOf, showReference } from './errors.js'

const notice = find(document, '#notice', HTMLElement)
const words = find(notice, 'span', HTMLElement)
const again = find(notice, '.again', HTMLButtonElement)
const reference = find(notice, '.reference', HTMLButtonElement)

// Keys scroll a long text.
new ResizeObserver(() => { words.tabIndex = words.scrollHeight > words.clientHeight ? 0 : -1 }).observe(words)

/**
 * @param {string} text An empty text hides the notice.
 * @param {() => void} [retry] What its button does.
 * @param {string} [ref] The reference of an error.
 */
export function showNotice(text, retry, ref) {
  showReference(reference, ref)
  words.textContent = text
  if (!text && notice.contains(document.activeElement)) find(document, '#prompt', HTMLElement).focus()
  notice.hidden = !text
  again.hidden = !retry
  again.onclick = retry ?? null
}

/** @param {unknown} error @param {() => void} [retry] */
export function showFailure(error, retry) {
  showNotice(messageOf(error), retry, referenceOf(error))
}
