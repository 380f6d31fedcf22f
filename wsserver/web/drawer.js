/** The list of conversations as a drawer, on narrow screens. */

import { find } from './dom.js'

const side = find(document, '#side', HTMLElement)
const main = find(document, 'main', HTMLElement)
const menu = find(document, '#menu', HTMLButtonElement)
const close = find(document, '#close-list', HTMLElement)
const narrow = matchMedia('(max-width: 52rem)')

export const isDrawerOpen = () => document.body.classList.contains('listing')

/** @param {boolean} open */
export function setDrawer(open) {
  const wasOpen = isDrawerOpen()
  document.body.classList.toggle('listing', open)
  menu.setAttribute('aria-expanded', String(open))
  side.inert = narrow.matches && !open
  main.inert = narrow.matches && open
  if (open) close.focus()
  else if (wasOpen) menu.focus()
}

menu.addEventListener('click', () => setDrawer(true))
close.addEventListener('click', () => setDrawer(false))
find(document, '#backdrop', HTMLElement).addEventListener('click', () => setDrawer(false))
narrow.addEventListener('change', () => setDrawer(false))
setDrawer(false)
