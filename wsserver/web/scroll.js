/** Keeps a reader at the end of the page there while it grows, and has a button to jump to the end. */

import { find } from './dom.js'

const NEAR_END = 40 // pixels from the end that count as the end
const root = document.documentElement
const jump = find(document, '#jump', HTMLButtonElement)
let atEnd = true // the reader follows the end of the text
let lastY = 0

/** Follow the end of the text from now on. */
export function followEnd() {
  atEnd = jump.hidden = true
  scrollToEnd()
}

/** Stay where the reader is: the reader wants to see text that opens now, not the end. */
export function stayHere() {
  atEnd = false
  requestAnimationFrame(() => { atEnd = jump.hidden = belowView() < 1 })
}

/** Keep an element where it is on the screen, whatever `change` puts above it. @param {Element | null} element @param {() => void} change */
export function keepInPlace(element, change) {
  const y = element?.getBoundingClientRect().top ?? 0
  change()
  scrollBy(0, (element?.getBoundingClientRect().top ?? 0) - y)
}

function scrollToEnd() {
  scrollTo({ top: root.scrollHeight, behavior: 'instant' })
  lastY = scrollY // a reader may scroll up before the event
}

const belowView = () => root.scrollHeight - innerHeight - scrollY

addEventListener('scroll', () => {
  atEnd = scrollY < lastY ? atEnd && belowView() < 1 : atEnd || belowView() < NEAR_END
  lastY = scrollY
  jump.hidden = atEnd
}, { passive: true })

// If the page grows, a reader at the end stays there. The observer runs after layout and before paint.
const sizes = new ResizeObserver(() => {
  if (atEnd) scrollToEnd()
})
sizes.observe(find(document, 'main', HTMLElement))
addEventListener('resize', () => {
  if (atEnd) scrollToEnd()
})
jump.addEventListener('click', followEnd)
