/** The title and the icon of the tab. They tell of a reply that ended while the tab was hidden. */

import { find } from './dom.js'

const icon = find(document, 'link[rel=icon]', HTMLLinkElement)
const READ = icon.href
const UNREAD = READ.replace('%3C/svg%3E', "%3Ccircle cx='12' cy='4' r='4' fill='%23d9382f'/%3E%3C/svg%3E")
let title = document.title
let isUnread = false

/** @param {string} text */
export function setTabTitle(text) {
  title = text
  show()
}

/** Tell of the end of a reply, if the tab is hidden. */
export function tellOfEnd() {
  isUnread ||= document.visibilityState === 'hidden'
  show()
}

function show() {
  const shown = isUnread ? `● ${title}` : title
  if (document.title !== shown) document.title = shown
  const href = isUnread ? UNREAD : READ
  if (icon.href !== href) icon.href = href
}

document.addEventListener('visibilitychange', () => {
  isUnread &&= document.visibilityState === 'hidden'
  show()
})
