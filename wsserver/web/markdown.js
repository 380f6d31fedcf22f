/**
 * Shows Markdown while it streams. `marked` parses it, `remend` completes marks that are still open,
 * DOMPurify removes all that could run or load something, and highlight.js colours code.
 *
 * A block is final once another block follows it: it is never rendered again. Only the last block is
 * rendered again when text arrives, and of that only the nodes change that differ. A long last block
 * is split. The work for each character is bounded.
 */

import * as libraries from './libraries/markdown.js'
import { cloneTemplate, find } from './dom.js'
import { extensions } from './markdown-syntax.js'
import { patch } from './patch.js'

const LARGE = 3_000 // characters of a last paragraph; a longer one is split
const MANY = 800 // characters of a last list or table; the first items or rows of a longer one become final
const WINDOW = 12_000 // characters that are parsed together
const TRIES = 5 // places where a long paragraph may be split
const SLICE = 5_000 // characters of code that are coloured together
const LONG_CODE = 40 // lines; longer code of an earlier reply is folded
const SHARE = 4 // the page renders for at most one part of this many of its time
const TASK = 8 // milliseconds; then the page does other things before it renders more
const AT_ONCE = 20_000 // characters of a whole reply that are rendered without a pause

// The end of the text, while the text after it decides what it is: a line that begins with the mark of
// a block, or is an underline of a heading or the delimiters of a table; and marks at the end.
const UNDECIDED = new RegExp([
  /(?:^|\n)[ \t>]*(?:[-+*]|\d{1,9}[.)]?)? *(?:\[[ xX]?\]?)? *$/,
  /(?:^|\n)[ \t>]*(?:#{1,6} *|=+|[-*_ ]{2,}|~{1,2}|(?:`{3,}|~{3,})[^\n]*|[|:\- \t]+|\[\^?[^\]\n]*)$/,
  /[*_~`\\\]]+$/,
].map(({ source }) => source).join('|'))
// The head of a table whose delimiters are not complete.
const TABLE_HEAD = /(?:^|\n)[ \t]*\|[^\n]*\n?[ \t|:-]*$/
const TABLE = /(?:^|\n)[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t:-]*)*\n/
const FENCE = /^( {0,3})(`{3,}|~{3,})([^\n]*)\n/
const SCHEMES = /^(?:https?|mailto|tel):/i
const INCOMPLETE = 'streamdown:incomplete-link' // the address that remend gives to half a link
const OUTSIDE = { target: '_blank', rel: 'noopener noreferrer nofollow' }
const LEAVES = 'p, li, h3, h4, h5, h6, summary'
const CONTAINERS = 'ul, ol, blockquote, table'
const RIGHT_TO_LEFT = /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/u // the first letter is

const { DOMPurify, Lexer, Marked, highlighter, remend } = libraries
/** Whether the libraries are there. Without them the text is shown as it is. */
export const available = Marked !== undefined

const marked = available ? new Marked({ gfm: true, breaks: true }, extensions) : undefined
let instances = 0

const PURIFY = {
  RETURN_DOM_FRAGMENT: true,
  ALLOWED_TAGS: [
    ...['a', 'b', 'blockquote', 'br', 'code', 'dd', 'del', 'details', 'dl', 'dt', 'em', 'h3', 'h4', 'h5', 'h6'],
    ...['hr', 'i', 'img', 'input', 'ins', 'kbd', 'li', 'mark', 'ol', 'p', 'pre', 's', 'span', 'strong', 'sub'],
    ...['summary', 'sup', 'table', 'tbody', 'td', 'th', 'thead', 'tr', 'u', 'ul', 'var'],
  ],
  // Addresses of some schemes, and all that is no address. `#finish` narrows this.
  ALLOWED_URI_REGEXP: /^(?:(?:https?|mailto|tel|streamdown|data):|[^a-z]|[a-z+.-]+(?:[^a-z+.\-:]|$))/i,
  ALLOWED_ATTR: ['href', 'src', 'alt', 'title', 'start', 'align', 'colspan', 'rowspan', 'checked', 'type', 'open', 'data-language', 'data-math', 'data-note', 'data-ref'],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
}

export class Markdown {
  #root
  #folds
  #whole = '' // all text
  #source = '' // the text that is not final: the last block
  #carry = '' // a carriage return, whose line feed may follow
  /** @type {ChildNode[]} The nodes of the last block. */ #shown = []
  /** @type {ChildNode[]} The items or rows of the last block that continue a list or a table. */ #items = []
  /** @type {Code | undefined} The code block that is open. */ #code
  /** @type {{home?: Element, head: string} | undefined} What the last block continues: a list, or the body of a table and the source of its head, or a paragraph. */ #continued
  /** @type {Record<string, any>} Definitions of links, by name. */ #links = {}
  /** @type {Map<string, number>} The numbers of footnotes, by name. */ #notes = new Map()
  #prefix = `note-${++instances}-`
  #ends = false // whether no more text follows
  #due = 0 // when the last block may be rendered again
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer
  /** @type {(() => void) | undefined} Called after each rendering. */ #wake

  /** @param {HTMLElement} root @param {boolean} [folds] Whether long code is folded. */
  constructor(root, folds = false) {
    this.#root = root
    this.#folds = folds
    root.classList.toggle('plain', !available)
  }

  /** @param {string} text */
  write(text) {
    if (!available) return this.#root.append(text)
    text = this.#carry + text
    this.#carry = text.endsWith('\r') ? '\r' : ''
    this.#add((this.#carry ? text.slice(0, -1) : text).replace(/\r\n?/g, '\n'))
    const wait = this.#due - performance.now()
    if (wait <= 0) this.#render()
    else this.#timer ??= setTimeout(() => this.#render(), wait)
  }

  /** Complete the last block. Resolves when all text is on the page. */
  async end() {
    if (!available) return
    this.#add(this.#carry && '\n')
    this.#carry = ''
    this.#ends = true
    this.#render()
    while (this.#timer !== undefined) await /** @type {Promise<void>} */ (new Promise((resolve) => { this.#wake = resolve }))
  }

  /** @param {string} text */
  #add(text) {
    this.#whole += text
    this.#source += text
  }

  /** Render the text that waits, or some of it. */
  #render() {
    const began = performance.now()
    clearTimeout(this.#timer)
    this.#timer = undefined
    let more = this.#source !== ''
    while (more && (performance.now() < began + TASK || (this.#ends && this.#source.length < AT_ONCE))) {
      more = this.#step() && this.#source !== ''
    }
    const now = performance.now()
    this.#due = now + (now - began) * (SHARE - 1)
    if (more) this.#timer = setTimeout(() => this.#render())
    else if (this.#ends) this.#finish()
    this.#wake?.()
  }

  /** Complete a reply whose text is on the page. */
  #finish() {
    this.#code?.end()
    this.#code = undefined
    if (!Object.keys(this.#links).length) return
    // An earlier block may use a definition that came after it.
    this.#shown = [...this.#root.childNodes]
    this.#show(this.#lex(this.#whole))
  }

  /** Make text final, or show the last block. @returns {boolean} Whether text became final. */
  #step() {
    if (this.#code) return this.#writeCode(this.#code)
    const head = this.#continued?.head ?? ''
    const source = this.#source.length > WINDOW * 1.5 ? this.#source.slice(0, WINDOW) : this.#source
    const ends = this.#ends && source === this.#source
    const tokens = this.#lex(head + source)
    let last = tokens.length - 1
    while (last > 0 && tokens[last].type === 'space') last--
    const final = ends ? tokens : tokens.slice(0, last)
    if (final.length) {
      this.#show(final)
      this.#settle(final.reduce((length, { raw }) => length + raw.length, -head.length))
      return true
    }
    const [mark, indent, fence, info] = FENCE.exec(source) ?? []
    if (tokens[last].type === 'code' && mark !== undefined) {
      this.#show([])
      this.#settle(mark.length)
      this.#code = new Code(this.#root, indent.length, fence, info.trim(), this.#folds)
      return true
    }
    const cut = cutOf(tokens[last], source)
    if (cut > 0) {
      this.#show(this.#lex(head + source.slice(0, cut)))
      const block = this.#shown.at(-1)
      const home = this.#continued?.home ?? (block instanceof Element ? listIn(block) : undefined)
      this.#settle(cut)
      this.#continued = { home, head: tokens[last].type === 'table' ? head || headOf(source) : '' }
      return true
    }
    this.#show(this.#lex(head + this.#complete()))
    return false
  }

  /** Return the last block without the text whose meaning is not clear, and with its open marks closed. */
  #complete() {
    let source = this.#source.replace(UNDECIDED, '')
    if (!this.#continued?.head && !TABLE.test(source)) source = source.replace(TABLE_HEAD, '')
    return remend(source.trimEnd(), { katex: false })
  }

  /** @param {string} source @returns {any[]} */
  #lex(source) {
    const lexer = new Lexer(marked?.defaults)
    Object.assign(lexer.tokens.links, this.#links)
    const tokens = lexer.lex(source)
    Object.assign(this.#links, lexer.tokens.links)
    return tokens
  }

  /** Show tokens in the place of the last block. @param {any[]} tokens */
  #show(tokens) {
    const fragment = purify(marked?.parser(tokens) ?? '')
    this.#complement(fragment)
    const home = this.#continued?.home
    const first = fragment.firstElementChild
    const list = first && listIn(first)
    const continues = home !== undefined && list?.localName === home.localName
    if (home) this.#items = patch(home, this.#items, continues ? [...list.children] : [])
    if (continues) first?.remove()
    else if (this.#continued && !home) first?.classList.add('on')
    this.#shown = patch(this.#root, this.#shown, [...fragment.childNodes].filter((node) => node.textContent?.trim() || node instanceof Element))
  }

  /** Make the nodes final that are shown. @param {number} length The length of their source. */
  #settle(length) {
    this.#source = this.#source.slice(length)
    this.#shown = []
    this.#items = []
    this.#continued = undefined
  }

  /** Write text to the open code block. @param {Code} code @returns {boolean} Whether text was written. */
  #writeCode(code) {
    const { length, ended } = code.write(this.#source)
    this.#source = this.#source.slice(length)
    if (ended) this.#code = undefined
    return length > 0
  }

  /** Complete what HTML cannot say. @param {DocumentFragment} fragment */
  #complement(fragment) {
    for (const block of fragment.querySelectorAll(LEAVES)) block.setAttribute('dir', 'auto')
    for (const block of fragment.querySelectorAll(CONTAINERS)) { // `auto` would not look into the leaves
      block.setAttribute('dir', RIGHT_TO_LEFT.test(block.textContent ?? '') ? 'rtl' : 'ltr')
    }
    for (const link of fragment.querySelectorAll('a:not([data-ref])')) {
      const address = link.getAttribute('href') ?? ''
      if (address === INCOMPLETE) link.removeAttribute('href')
      else if (SCHEMES.test(address)) Object.assign(link, OUTSIDE)
      else link.replaceWith(...link.childNodes)
    }
    for (const image of fragment.querySelectorAll('img')) replaceImage(image)
    for (const input of fragment.querySelectorAll('input')) {
      const box = document.createElement('span')
      box.className = input.checked ? 'task done' : 'task'
      box.setAttribute('role', 'img')
      box.ariaLabel = input.checked ? 'Done' : 'To do'
      input.replaceWith(box)
    }
    for (const table of fragment.querySelectorAll('table')) {
      const frame = document.createElement('div')
      frame.className = 'table'
      frame.tabIndex = 0
      table.replaceWith(frame)
      frame.append(table)
    }
    for (const element of fragment.querySelectorAll('pre')) {
      const { language = '' } = element.dataset
      const figure = makeFigure(language)
      showCode(find(figure, 'code', HTMLElement), (element.textContent ?? '').replace(/\n+$/, ''), language)
      closeFigure(figure, this.#folds)
      element.replaceWith(figure)
    }
    for (const element of fragment.querySelectorAll('[data-math]')) {
      if (element instanceof HTMLElement) showMath(element)
    }
    for (const mark of fragment.querySelectorAll('[data-ref]')) {
      if (!(mark instanceof HTMLAnchorElement)) continue
      const number = this.#numberOf(mark.dataset.ref ?? '')
      mark.textContent = String(number)
      mark.href = `#${this.#prefix}${number}`
    }
    for (const note of fragment.querySelectorAll('[data-note]')) {
      if (note instanceof HTMLElement) note.id = this.#prefix + this.#numberOf(note.dataset.note ?? '')
    }
  }

  /** @param {string} name */
  #numberOf(name) {
    if (!this.#notes.has(name)) this.#notes.set(name, this.#notes.size + 1)
    return this.#notes.get(name)
  }
}

/** A fenced code block whose end has not arrived. */
class Code {
  #figure
  #slice = document.createElement('span')
  #text = '' // of the slice
  #line = '' // the last line, as far as it may be the closing fence
  #due = 0 // when the slice may be coloured again

  /**
   * @param {HTMLElement} root
   * @param {number} indent @param {string} fence @param {string} language
   * @param {boolean} folds
   */
  constructor(root, indent, fence, language, folds) {
    this.language = language
    this.folds = folds
    this.indent = new RegExp(`^ {0,${indent}}`)
    this.closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`)
    this.maybe = new RegExp(`^ {0,3}${fence[0]}*[ \\t]*$`)
    this.#figure = makeFigure(language)
    root.append(this.#figure)
    find(this.#figure, 'code', HTMLElement).append(this.#slice)
  }

  /** @param {string} source @returns {{length: number, ended: boolean}} How much of the source was written. */
  write(source) {
    let place = 0
    for (;;) {
      const end = source.indexOf('\n', place)
      const line = source.slice(place, end < 0 ? undefined : end)
      if (end >= 0 && this.closing.test(line)) {
        this.end()
        return { length: end + 1, ended: true }
      }
      if (end < 0) {
        if (!this.maybe.test(line) && this.#line === '') {
          this.#append(line.replace(this.indent, ''))
          this.#line = line
          place += line.length
        } else if (this.#line !== '') {
          this.#append(line)
          place += line.length
        }
        break
      }
      this.#append((this.#line === '' ? line.replace(this.indent, '') : line) + '\n')
      this.#line = ''
      place = end + 1
      if (this.#text.length > SLICE) {
        this.#next()
        return { length: place, ended: false }
      }
    }
    this.#colour(false)
    return { length: place, ended: false }
  }

  end() {
    this.#text = this.#text.replace(/\n+$/, '')
    this.#colour(true)
    closeFigure(this.#figure, this.folds)
  }

  /** @param {string} text */
  #append(text) {
    this.#text += text
    const { lastChild } = this.#slice
    if (lastChild instanceof Text) lastChild.appendData(text)
    else this.#slice.append(text)
  }

  /** Begin another slice. */
  #next() {
    this.#colour(true)
    this.#slice = document.createElement('span')
    this.#text = ''
    find(this.#figure, 'code', HTMLElement).append(this.#slice)
  }

  /** @param {boolean} now */
  #colour(now) {
    const began = performance.now()
    if (!now && began < this.#due) return
    patch(this.#slice, [...this.#slice.childNodes], [...highlight(this.#text, this.language).childNodes])
    const end = performance.now()
    this.#due = end + (end - began) * (SHARE - 1)
  }
}

/** Return where to split the last block; 0 if it is not to be split. @param {any} token @param {string} source */
function cutOf({ type, items = [], rows = [] }, source) {
  if (type === 'list' && source.length > MANY) {
    return items.slice(0, -1).reduce((/** @type {number} */ length, /** @type {{raw: string}} */ { raw }) => length + raw.length, 0)
  }
  if (type === 'table' && source.length > MANY && rows.length > 1) return source.trimEnd().lastIndexOf('\n') + 1
  if (type !== 'paragraph' || source.length <= LARGE) return 0
  // Before a word outside all marks, if there is such a place; else anywhere.
  const places = [...source.slice(0, LARGE).matchAll(/\s(?=\S)/g)].map(({ index }) => index + 1)
  const free = places.slice(-TRIES).reverse().find((place) => remend(source.slice(0, place)).length === place)
  if (free !== undefined) return free
  return /[\ud800-\udbff]/.test(source[LARGE - 1]) ? LARGE - 1 : LARGE
}

/** Return the list, or the body of the table, that a block is. @param {Element} block */
function listIn(block) {
  if (block.matches('ul, ol')) return block
  return block.matches('.table') ? (block.querySelector('tbody') ?? undefined) : undefined
}

/** Return the source of a table's head: two lines. @param {string} source */
function headOf(source) {
  return source.split('\n', 2).map((line) => `${line}\n`).join('')
}

/** @param {string} html @returns {DocumentFragment} */
function purify(html) {
  return /** @type {any} */ (DOMPurify.sanitize(html, PURIFY))
}

/** Return coloured code; code of an unknown language has no colours. @param {string} text @param {string} language @returns {DocumentFragment} */
function highlight(text, language) {
  const name = nameOf(language).toLowerCase()
  if (!highlighter.getLanguage(name)) {
    const fragment = new DocumentFragment()
    fragment.append(text)
    return fragment
  }
  const { value } = highlighter.highlight(text, { language: name, ignoreIllegals: true })
  return /** @type {any} */ (DOMPurify.sanitize(value, { RETURN_DOM_FRAGMENT: true, ALLOWED_TAGS: ['span'], ALLOWED_ATTR: ['class'] }))
}

/** Show code in slices, which are coloured one by one. @param {HTMLElement} element @param {string} text @param {string} language */
function showCode(element, text, language) {
  while (text) {
    let end = text.length > SLICE ? text.lastIndexOf('\n', SLICE) + 1 : text.length
    if (end === 0) end = text.length
    const slice = document.createElement('span')
    slice.append(highlight(text.slice(0, end), language))
    element.append(slice)
    text = text.slice(end)
  }
}

/** Return the first word of what follows a fence. @param {string} info */
function nameOf(info) {
  return info.split(/[\s,{]/, 1)[0]
}

/** @param {string} language */
function makeFigure(language) {
  const figure = cloneTemplate('code')
  find(figure, '.language', HTMLElement).textContent = nameOf(language) || 'code'
  return figure
}

/** Let long code be folded. @param {HTMLElement} figure @param {boolean} folded */
function closeFigure(figure, folded) {
  const lines = (find(figure, 'code', HTMLElement).textContent ?? '').split('\n').length
  if (lines <= LONG_CODE) return
  const fold = find(figure, '.fold', HTMLButtonElement)
  fold.hidden = false
  fold.dataset.lines = String(lines)
  foldCode(figure, folded)
}

/** @param {HTMLElement} figure @param {boolean} folded */
export function foldCode(figure, folded) {
  const fold = find(figure, '.fold', HTMLButtonElement)
  figure.classList.toggle('folded', folded)
  fold.setAttribute('aria-expanded', String(!folded))
  fold.textContent = folded ? `Show all ${fold.dataset.lines} lines` : 'Show fewer lines'
}

/** Show a link in the place of an image: a page that loads it would tell a stranger who reads it when. @param {HTMLImageElement} image */
function replaceImage(image) {
  const address = image.getAttribute('src') ?? ''
  if (/^data:image\/(?:png|jpeg|gif|webp);/.test(address)) return
  const link = document.createElement('a')
  link.className = 'image'
  if (/^https?:/i.test(address)) Object.assign(link, { href: address, ...OUTSIDE })
  link.textContent = image.alt || 'Image'
  image.replaceWith(link)
}

/** @type {Promise<typeof import('./libraries/math.js')> | undefined} */
let math

/** Show a formula once KaTeX is loaded. @param {HTMLElement} element */
function showMath(element) {
  const source = element.textContent ?? ''
  const display = element.dataset.math === 'block'
  element.className = display ? 'math block' : 'math'
  element.dir = 'ltr'
  if (math === undefined) {
    math = import('./libraries/math.js')
    const style = document.createElement('link')
    style.rel = 'stylesheet'
    style.href = new URL('libraries/math.css', import.meta.url).href
    document.head.append(style)
  }
  Object.assign(element, { source })
  math.then(({ render }) => {
    if (/** @type {any} */ (element).source !== source) return
    render(source, element, { displayMode: display, maxSize: 20, maxExpand: 200, strict: 'ignore' })
  }).catch(() => { element.textContent = source }) // no formula, or no KaTeX
}
