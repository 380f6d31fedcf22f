/** Keyboard shortcuts, and the dialog that lists them. */

import { INTERRUPT } from './compose.js'
import { find, isComposing } from './dom.js'

const dialog = find(document, '#shortcuts', HTMLDialogElement)

/** Return the first of the elements that is shown. @param {string} selector */
function shown(selector) {
  const element = document.querySelector(selector)
  return element instanceof HTMLElement && element.checkVisibility({ visibilityProperty: true }) ? element : undefined
}

const toggleList = () => (shown('#close-list') ?? shown('#collapse') ?? shown('#menu'))?.click()

/** Actions of keys with Alt and Shift, which hinder neither typing nor screen readers. @type {Record<string, () => void>} */
const ACTIONS = {
  KeyN: () => find(document, '#new', HTMLElement).click(),
  KeyC: () => shown('.turn:last-child .copy')?.click(),
  KeyL: toggleList,
  KeyM: () => shown('#prompt')?.focus(),
  KeyK: () => {
    const search = find(document, '#search', HTMLElement)
    if (!search.hidden && !shown('#search')) toggleList()
    search.focus()
  },
}

/** Whether keys type text there. @param {EventTarget | null} target */
const takesText = (target) => target instanceof Element && target.closest('input, textarea, select') !== null

addEventListener('keydown', (event) => {
  const { code, key, altKey, shiftKey, ctrlKey, metaKey, target } = event
  if (isComposing(event) || event.defaultPrevented || ctrlKey || metaKey || document.querySelector('dialog[open]')) return
  if (key === '?' && !altKey && !takesText(target)) {
    event.preventDefault()
    dialog.showModal()
    return
  }
  const act = altKey && shiftKey && Object.hasOwn(ACTIONS, code) ? ACTIONS[code] : undefined
  if (!act) return
  event.preventDefault()
  act()
})
find(dialog, '.interrupt', HTMLElement).textContent = INTERRUPT
find(document, '#show-shortcuts', HTMLElement).addEventListener('click', () => dialog.showModal())
