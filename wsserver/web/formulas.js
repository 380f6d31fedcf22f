/** Formulas of replies. KaTeX typesets them; the page loads KaTeX for the first formula. */

import { doEach } from './slices.js'

/** @type {((source: string, element: HTMLElement, options: object) => void) | undefined} KaTeX, once it is loaded. */
let renderMath
/** @type {HTMLElement[] | undefined} The formulas that wait for KaTeX; undefined before the first one. */
let formulas

/** Show a formula: its source, until KaTeX is loaded. @param {HTMLElement} element */
export function showFormula(element) {
  element.className = element.dataset.math === 'block' ? 'math block' : 'math'
  element.dir = 'ltr'
  Object.assign(element, { source: element.textContent ?? '' })
  if (renderMath) return typeset(element)
  if (!formulas) loadMath(formulas = [])
  formulas.push(element)
}

/** @param {HTMLElement[]} waiting */
async function loadMath(waiting) {
  const style = document.createElement('link')
  style.rel = 'stylesheet'
  style.href = new URL('libraries/math.css', import.meta.url).href
  document.head.append(style)
  try {
    renderMath = (await import('./libraries/math.js')).render
    doEach(waiting, typeset)
  } catch { // the formulas stay as they are written
  }
}

/** @param {HTMLElement} element */
function typeset(element) {
  const { source } = /** @type {any} */ (element)
  try {
    renderMath?.(source, element, { displayMode: element.dataset.math === 'block', maxSize: 20, maxExpand: 200, strict: 'ignore' })
  } catch {
    element.textContent = source // no formula
  }
}
