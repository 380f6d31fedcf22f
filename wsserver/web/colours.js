/** Colours of code. highlight.js finds them; the page loads it for the first code that names a language. */

import * as libraries from './libraries/markdown.js'
import { patch } from './patch.js'
import { doEach } from './slices.js'

const LONGEST = 20_000 // characters; a longer text has no colours
/** What is used if highlight.js cannot be loaded. */
const NONE = { getLanguage: () => undefined }

/** @type {any} highlight.js, once it is loaded. */
let highlighter
/** @type {Map<HTMLElement, string> | undefined} The languages of texts that wait for it; undefined before the first one. */
let waiting

/**
 * Show a text in the colours of its language. A text of an unknown language has none.
 * @param {HTMLElement} element
 * @param {string} text
 * @param {string} language
 */
export function colour(element, text, language) {
  patch(element, [...element.childNodes], [...coloured(text, language).childNodes])
  if (highlighter || !language) return
  if (!waiting) load(waiting = new Map())
  waiting.set(element, language)
}

/** @param {Map<HTMLElement, string>} texts */
async function load(texts) {
  highlighter = await import('./libraries/code.js').then((library) => library.highlighter ?? NONE, () => NONE)
  doEach([...texts], ([element, language]) => colour(element, element.textContent ?? '', language))
}

/** @param {string} text @param {string} language @returns {DocumentFragment} */
function coloured(text, language) {
  if (!highlighter?.getLanguage(language) || text.length > LONGEST) {
    const fragment = new DocumentFragment()
    fragment.append(text)
    return fragment
  }
  const { value } = highlighter.highlight(text, { language, ignoreIllegals: true })
  return libraries.DOMPurify.sanitize(value, { RETURN_DOM_FRAGMENT: true, ALLOWED_TAGS: ['span'], ALLOWED_ATTR: ['class'] })
}
