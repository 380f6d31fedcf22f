/**
 * Shows Markdown while it streams. `marked` parses it, `remend` completes marks that are still open,
 * DOMPurify removes all that could run or load something, and highlight.js colours code.
 *
 * A block is final once another block follows it: it is never rendered again. Only the last block is
 * rendered again when text arrives, and of that only the nodes change that differ. A long last block
 * is split. The work for each character is bounded.
 */

import * as libraries from './libraries/markdown.js'
import { codeBlock, OpenCode } from './code.js'
import { showFormula } from './formulas.js'
import { extensions } from './markdown-syntax.js'
import { patch } from './patch.js'
import { cancel, doLater, hasTime } from './slices.js'

const LARGE = 3_000 // characters of a last paragraph; a longer one is split
const MANY = 800 // characters of a last list or table; the first items or rows of a longer one become final
const WINDOW = 3_000 // characters that are parsed together, if blocks are not longer
const TRIES = 5 // places where a long paragraph may be split
const SHARE = 4 // the page renders for at most one part of this many of its time

// A short last line that the text after it may turn into the mark of a block, with a box to tick, or into
// an underline of a heading.
const BEGUN = /^[ \t>]*(?:(?:[-+*]|\d{1,9}[.)]?)? *(?:\[[ xX]?\]?)?|#{1,6} *|=+|[-*_ ]{2,}|~{1,2}|\[[^\]]*\]?) *$/
const SHORT = 80 // characters
const DELIMITERS = /^[|:\- \t]+$/
const DEFINITION = /^ {0,3}\[(?!\^)[^\]]+\]:[ \t]*(?:\S+(?:[ \t]+(?:["'(].*)?)?)?$/ // of a link; perhaps a part
const HALF_REFERENCE = /\]\[[^\]\n]*$/
const ROW = /^[ \t]*\|/
const HALF_FENCE = /^[ \t>]*(?:`{3,}|~{3,})/
const MARKS = /[*_~`\\\]]+$/
const FENCE = /^( {0,3})(`{3,}|~{3,})([^\n]*)\n/
const SCHEMES = /^(?:https?|mailto|tel):/i
const INCOMPLETE = 'streamdown:incomplete-link' // the address that remend gives to half a link
const OUTSIDE = { target: '_blank', rel: 'noopener noreferrer nofollow' }
const LEAVES = 'p, li, h3, h4, h5, h6, summary'
const ENDS = 'ul, ol, li, p, h3, h4, h5, h6' // what a mark at the end of the text can be in
const CONTAINERS = 'ul, ol, blockquote, table'
const RIGHT_TO_LEFT = /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/u // the first letter is

const { DOMPurify, Lexer, Marked, remend } = libraries
const available = Marked !== undefined // whether the libraries are there; without them the text is shown as it is

const marked = available ? new Marked({ gfm: true, breaks: true }, extensions) : undefined
let instances = 0

const PURIFY = {
  RETURN_DOM_FRAGMENT: true,
  ALLOWED_TAGS: [
    ...['a', 'b', 'blockquote', 'br', 'code', 'dd', 'del', 'details', 'dl', 'dt', 'em', 'h3', 'h4', 'h5', 'h6'],
    ...['hr', 'i', 'img', 'input', 'ins', 'kbd', 'li', 'mark', 'ol', 'p', 'pre', 's', 'span', 'strong', 'sub'],
    ...['summary', 'sup', 'table', 'tbody', 'td', 'th', 'thead', 'tr', 'u', 'ul', 'var'],
  ],
  // Addresses of some schemes, and all that is no address. `#complement` narrows this.
  ALLOWED_URI_REGEXP: /^(?:(?:https?|mailto|tel|streamdown|data):|[^a-z]|[a-z+.-]+(?:[^a-z+.\-:]|$))/i,
  ALLOWED_ATTR: ['href', 'src', 'alt', 'title', 'start', 'align', 'colspan', 'rowspan', 'checked', 'type', 'open', 'data-language', 'data-math', 'data-note', 'data-ref'],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
}

/** @typedef {{home?: Element, head: string}} Continued What a block continues: a list, or the body of a table and the source of its head, or a paragraph. */
/** @typedef {{source: string, names: Set<string>, shown: ChildNode[], items: ChildNode[], continued: Continued | undefined}} Final */

export class Markdown {
  #root
  #folds
  #source = '' // the text that is not final: the last block
  #carry = '' // a carriage return, whose line feed may follow
  /** @type {ChildNode[]} The nodes of the last block. */ #shown = []
  /** @type {ChildNode[]} The items or rows of the last block that continue a list or a table. */ #items = []
  /** @type {OpenCode | undefined} The code block that is open. */ #code
  /** @type {Continued | undefined} What the last block continues. */ #continued
  /** @type {Record<string, any>} Definitions of links in final blocks, by name. */ #links = Object.create(null)
  /** @type {Set<string>} Names in the text that was parsed last, of links without such a definition. */ #undefined = new Set()
  /** @type {Final[]} Final blocks with names of such links. */ #unlinked = []
  /** @type {Map<string, number>} The numbers of footnotes, by name. */ #notes = new Map()
  #prefix = `note-${++instances}-`
  #ends = false // whether no more text follows
  #due = 0 // when the last block may be rendered again
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer
  /** @type {Element | undefined} The element with the mark. */ #marked
  #unfinished = false // whether a later slice renders more
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
    this.#source += (this.#carry ? text.slice(0, -1) : text).replace(/\r\n?/g, '\n')
    const wait = this.#due - performance.now()
    if (wait <= 0) this.#render()
    else this.#timer ??= setTimeout(() => this.#render(), wait)
  }

  /** Complete the last block. Resolves when all text is on the page. */
  async end() {
    if (!available) return
    this.#source += this.#carry && '\n'
    this.#carry = ''
    this.#ends = true
    this.#render()
    while (this.#unfinished) await /** @type {Promise<void>} */ (new Promise((resolve) => { this.#wake = resolve }))
  }

  /** Render the text that waits, or some of it. */
  #render = () => {
    const began = performance.now()
    cancel(this.#render)
    clearTimeout(this.#timer)
    this.#timer = undefined
    let more = this.#source !== ''
    while (more && hasTime()) more = this.#tryStep() && this.#source !== ''
    this.#mark()
    if (!more && this.#ends) more = !this.#finish()
    const now = performance.now()
    this.#due = now + (now - began) * (SHARE - 1)
    this.#unfinished = more
    if (more) doLater(this.#render)
    this.#wake?.()
  }

  /** Mark the end of a reply that is being written. Without this attribute, a style for the end would look at the whole reply when it ends. */
  #mark() {
    this.#marked?.removeAttribute('data-end')
    this.#marked = undefined
    for (let last = this.#root.lastElementChild; last?.matches(ENDS) && !this.#ends; last = last.lastElementChild) this.#marked = last
    this.#marked?.setAttribute('data-end', '')
  }

  /** Complete a reply whose text is on the page. @returns {boolean} Whether there was time for all of it. */
  #finish() {
    this.#code?.end()
    this.#code = undefined
    while (this.#unlinked.length) {
      if (!hasTime()) return false
      this.#link(/** @type {Final} */ (this.#unlinked.pop()))
    }
    setLevels(this.#root)
    return true
  }

  /** Render a final block again, if a definition came after it. @param {Final} block */
  #link({ source, names, shown, items, continued }) {
    if (![...names].some((name) => name in this.#links)) return
    this.#shown = shown
    this.#items = items
    this.#continued = continued
    this.#show(this.#lex(source))
  }

  /** Do a step. A block that is nested too deeply for the parser is shown as plain text. @returns {boolean} Whether text became final. */
  #tryStep() {
    try {
      return this.#step()
    } catch (error) {
      if (!(error instanceof RangeError)) throw error
      const end = this.#source.indexOf('\n\n') + 2
      const length = end > 1 ? end : this.#source.length
      const block = document.createElement('p')
      block.className = 'plain'
      block.append(this.#source.slice(0, length).trimEnd())
      this.#shown = patch(this.#root, this.#shown, [block])
      this.#settle([], length)
      return true
    }
  }

  /** Make text final, or show the last block. @returns {boolean} Whether text became final. */
  #step() {
    if (this.#code) return this.#writeCode(this.#code)
    const head = this.#continued?.head ?? ''
    const [source, tokens] = this.#lexWindow(head)
    const ends = this.#ends && source === this.#source
    let last = tokens.length - 1
    while (last > 0 && tokens[last].type === 'space') last--
    const final = ends ? tokens : tokens.slice(0, last)
    if (final.length) {
      this.#show(final)
      this.#settle(final, final.reduce((length, { raw }) => length + raw.length, -head.length))
      return true
    }
    const [mark, indent, fence, info] = FENCE.exec(source) ?? []
    if (tokens[last].type === 'code' && mark !== undefined) {
      this.#show([])
      this.#settle([], mark.length)
      this.#code = new OpenCode(this.#root, { indent: indent.length, fence, info: info.trim() }, this.#folds)
      return true
    }
    const cut = cutOf(tokens[last], source)
    if (cut > 0) {
      const part = this.#lex(head + source.slice(0, cut))
      this.#show(part)
      const block = this.#shown.at(-1)
      const home = this.#continued?.home ?? (block instanceof Element ? listIn(block) : undefined)
      if (home && home !== this.#continued?.home) { // more items or rows will follow these
        this.#shown = []
        this.#items = [...home.children]
        this.#continued = { home, head }
      }
      this.#settle(part, cut)
      this.#continued = { home, head: tokens[last].type === 'table' ? head || headOf(source) : '' }
      return true
    }
    const isTable = tokens[last].type === 'table' && (head !== '' || this.#source.split('\n', 3).length > 2)
    this.#show(this.#lex(head + (this.#ends ? this.#source : this.#complete(isTable))))
    return false
  }

  /** Return the last block without the text whose meaning is not clear, and with its open marks closed. @param {boolean} isTable Whether it has the whole head of a table. */
  #complete(isTable) {
    let source = this.#source
    const place = source.lastIndexOf('\n') + 1
    const line = source.slice(place)
    if (HALF_FENCE.test(line) || DELIMITERS.test(line) || DEFINITION.test(line) || (line.length <= SHORT && BEGUN.test(line))) source = source.slice(0, place)
    if (!isTable) { // without its delimiters the head of a table is a paragraph
      const before = source.trimEnd().lastIndexOf('\n') + 1
      if (ROW.test(source.slice(before))) source = source.slice(0, before)
    }
    const marks = MARKS.exec(source.slice(-SHORT))?.[0].length ?? 0
    return remend(source.slice(0, source.length - marks).trimEnd().replace(HALF_REFERENCE, ''), { katex: false })
  }

  /** Parse the beginning of the text, with the end of its first block. @param {string} head @returns {[string, any[]]} The source without the head, and its tokens. */
  #lexWindow(head) {
    for (let size = WINDOW; ; size *= 2) {
      const source = this.#source.length > size * 1.5 ? this.#source.slice(0, size) : this.#source
      const tokens = this.#lex(head + source)
      if (source === this.#source || tokens.length > 2 || cutOf(tokens[0], source) > 0 || FENCE.test(source)) return [source, tokens]
    }
  }

  /** @param {string} source @returns {any[]} */
  #lex(source) {
    const lexer = new Lexer(marked?.defaults)
    const names = this.#undefined = new Set()
    lexer.tokens.links = new Proxy(this.#links, {
      get(links, /** @type {string} */ name) {
        if (!(name in links)) names.add(name)
        return links[name]
      },
      set: () => true, // a definition that is not final may be a part of one
    })
    return lexer.lex(source)
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
    if (continues) {
      const [head, shown] = [list, home].map((body) => body.previousElementSibling)
      if (head && shown) patch(shown, [...shown.childNodes], [...head.childNodes]) // of a table
      first?.remove()
    } else if (this.#continued && !home) first?.classList.add('on')
    this.#shown = patch(this.#root, this.#shown, [...fragment.childNodes].filter((node) => node.textContent?.trim() || node instanceof Element))
  }

  /** Make the nodes final that are shown. @param {any[]} tokens @param {number} length The length of their source. */
  #settle(tokens, length) {
    const names = this.#undefined
    if (tokens.length && names.size && (this.#shown.length || this.#items.length)) {
      const source = (this.#continued?.head ?? '') + this.#source.slice(0, length)
      this.#unlinked.push({ source, names, shown: this.#shown, items: this.#items, continued: this.#continued })
    }
    marked?.walkTokens(tokens, (/** @type {any} */ { type, tag, href, title }) => {
      if (type === 'def') this.#links[tag] ??= { href, title }
    })
    this.#source = this.#source.slice(length)
    this.#shown = []
    this.#items = []
    this.#continued = undefined
  }

  /** Write text to the open code block. @param {OpenCode} code @returns {boolean} Whether text was written. */
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
      element.replaceWith(codeBlock(element.textContent ?? '', element.dataset.language ?? '', this.#folds))
    }
    for (const element of fragment.querySelectorAll('[data-math]')) {
      if (element instanceof HTMLElement) showFormula(element)
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

/** Tell screen readers levels of headings without gaps, whichever level the text begins with. @param {Element} root */
function setLevels(root) {
  /** @type {string[]} */
  const open = []
  for (const heading of root.querySelectorAll('h3, h4, h5, h6')) {
    while ((open.at(-1) ?? '') >= heading.tagName) open.pop()
    open.push(heading.tagName)
    const level = String(open.length + 2)
    if (!heading.tagName.endsWith(level)) heading.ariaLevel = level
  }
}
