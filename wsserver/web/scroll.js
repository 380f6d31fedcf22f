/** Keeps a reader at the end of the page there while it grows, and has a button to jump to the end. */

import { find } from './dom.js'

const NEAR_END = 40 // pixels from the end that count as the end
const root = document.documentElement
const jump = find(document, '#jump', HTMLButtonElement)
const log = find(document, '#log', HTMLElement)
let atEnd = true // the reader follows the end of the text
let lastY = 0

/** Follow the end of the text from now on. */
export function followEnd() {
  setAtEnd(true)
  scrollToEnd()
}

/** Stay where the reader is: the reader wants to see text that opens now, not the end. */
export function stayHere() {
  atEnd = false
  requestAnimationFrame(() => setAtEnd(belowView() < 1))
}

/**
 * Keep a reader at the end there, whatever `change` measures meanwhile. To measure is to lay the page out: a page that
 * shrinks and grows again has moved the reader up, and no observer of sizes notices it.
 * @param {() => void} change
 */
export function keepAtEnd(change) {
  change()
  if (atEnd) scrollToEnd()
}

/** Keep an element where it is on the screen, whatever `change` puts above it. @param {Element | null} element @param {() => void} change */
export function keepInPlace(element, change) {
  const y = element?.getBoundingClientRect().top ?? 0
  change()
  scrollBy(0, (element?.getBoundingClientRect().top ?? 0) - y)
}

/** @param {boolean} now */
function setAtEnd(now) {
  atEnd = jump.hidden = now
  if (now) showNews(false)
}

/** Show on the button whether there is new text below. @param {boolean} news */
function showNews(news) {
  jump.classList.toggle('news', news)
  jump.setAttribute('aria-label', news ? 'New text: jump to the end' : 'Jump to the end')
}

function scrollToEnd() {
  const isEmpty = log.childElementCount === 0 // the page shows what to try, which may be longer than a small screen
  scrollTo({ top: isEmpty ? 0 : root.scrollHeight, behavior: 'instant' })
  lastY = scrollY // a reader may scroll up before the event
}

const belowView = () => root.scrollHeight - innerHeight - scrollY

addEventListener('scroll', () => {
  setAtEnd(scrollY < lastY ? atEnd && belowView() < 1 : atEnd || belowView() < NEAR_END)
  lastY = scrollY
}, { passive: true })

// If the page grows, a reader at the end stays there. The observer runs after layout and before paint.
const sizes = new ResizeObserver(() => {
  if (atEnd) scrollToEnd()
  else if (log.querySelector('[aria-busy=true]')) showNews(true)
})
sizes.observe(find(document, 'main', HTMLElement))
addEventListener('resize', () => {
  if (atEnd) scrollToEnd()
})
jump.addEventListener('click', followEnd)
