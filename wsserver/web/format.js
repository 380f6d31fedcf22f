/**
 * Formats a subset of Markdown while the text streams: paragraphs, headings, lists, code blocks, and
 * `code`, **strong** and *emphasized* text in a line. It appends nodes and text at the end, never HTML.
 * Unknown marks stay as text. The time is linear in the length of the text.
 */

import { cloneTemplate, find } from './dom.js'

const FENCE = /^ *(`{3,})([^`\n]*)\n/
const HEADING = /^(#{1,6}) +/
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +/
const RULE = /^ {0,3}-{3,} *\n/
// The beginning of a line, trimmed, that may become one of these with more text.
const UNDECIDED = /^(?:`{1,2}|`{3,}[^`\n]{0,80}|#{1,6}|[*+]|-+|\d{1,9}[.)]?)?$/
const UNDECIDED_CODE = /^`*$/
const LARGE = 2_000 // characters
const MARKS = /(`+|\*\*?)/
const ELEMENTS = /** @type {Record<string, string>} */ ({ '**': 'strong', '*': 'em' })

export class Formatter {
  #root
  #held = '' // the end of the text, while its meaning depends on the text that follows
  #atLineStart = true
  /** @type {{element: HTMLElement, text: Text, fence: string} | undefined} */ #code
  /** @type {HTMLElement | undefined} The element that the current line is appended to. */ #block
  /** @type {{list: HTMLElement, indent: number}[]} The open lists, outermost first. */ #lists = []
  /** @type {{element: HTMLElement, mark: string}[]} The open marks of this line. */ #marked = []

  /** @param {HTMLElement} root */
  constructor(root) {
    this.#root = root
  }

  /** @param {string} text */
  write(text) {
    const lines = (this.#held + text).split(/(?<=\n)/)
    this.#held = ''
    for (const line of lines) {
      if (this.#code) this.#codeLine(line, this.#code)
      else this.#line(line)
    }
  }

  /** Format the text that was held back. */
  end() {
    this.write('\n')
  }

  /** @param {string} line A line or its end. All but the last have a newline. */
  #line(line) {
    const whole = line.endsWith('\n')
    if (this.#atLineStart) {
      if (!whole && UNDECIDED.test(line.trim())) return void (this.#held = line)
      const [, fence, language] = FENCE.exec(line) ?? []
      if (fence !== undefined) return this.#openCode(line, fence, language.trim())
      line = this.#open(line)
      this.#atLineStart = false
    }
    if (whole) {
      this.#inline(line.slice(0, -1))
      this.#endLine()
    } else {
      let end = line.length
      while (line[end - 1] === '`' || line[end - 1] === '*') end--
      this.#held = line.slice(end)
      this.#inline(line.slice(0, end))
    }
  }

  /** Open the block that a line begins. @param {string} line @returns {string} The line without its mark. */
  #open(line) {
    const [begin, indent, bullet] = ITEM.exec(line) ?? []
    if (!line.trim()) this.#block = undefined
    else if (begin !== undefined) {
      this.#item(indent.length, bullet)
      return line.slice(begin.length)
    } else if (HEADING.test(line)) {
      const [marks, { length }] = HEADING.exec(line) ?? ['', '']
      this.#lists = []
      // The page uses the levels 1 and 2 itself.
      this.#block = this.#add(`h${Math.min(6, length + 2)}`)
      return line.slice(marks.length)
    } else if (RULE.test(line)) {
      this.#lists = []
      this.#add('hr')
      this.#block = undefined
      return '\n'
    } else if (!this.#block || /^H/.test(this.#block.tagName)) {
      if (!line.startsWith('  ')) this.#lists = []
      this.#block = this.#add('p')
      return line.trimStart()
    } else {
      this.#append('\n')
      // The browser lays out a whole block after each change, so a long paragraph continues in another one.
      if (this.#block.localName === 'p' && (this.#block.textContent ?? '').length > LARGE) {
        this.#block = this.#add('p')
        this.#block.className = 'on'
      }
      return line.trimStart()
    }
    return line
  }

  /** @param {number} indent @param {string} bullet */
  #item(indent, bullet) {
    const type = /\d/.test(bullet) ? 'ol' : 'ul'
    while (this.#lists.length && indent < (this.#lists.at(-1)?.indent ?? 0)) this.#lists.pop()
    const last = this.#lists.at(-1)
    if (last && indent < last.indent + 2 && last.list.localName !== type) this.#lists.pop()
    if (!last || indent >= last.indent + 2 || last.list.localName !== type) {
      const list = this.#add(type)
      const first = Number.parseInt(bullet)
      if (list instanceof HTMLOListElement && first !== 1) list.start = first
      this.#lists.push({ list, indent })
    }
    this.#block = document.createElement('li')
    this.#lists.at(-1)?.list.append(this.#block)
  }

  /** Append a block to the open list item, or to the root. @param {string | HTMLElement} block */
  #add(block) {
    const element = typeof block === 'string' ? document.createElement(block) : block
    const home = this.#lists.at(-1)?.list.lastElementChild ?? this.#root
    home.append(element)
    return element
  }

  // Within a line.

  /** @param {string} text */
  #inline(text) {
    const tokens = text.split(MARKS)
    tokens.forEach((token, place) => {
      if (place % 2 === 0) return this.#append(token)
      const open = this.#marked.findIndex(({ mark }) => mark === token)
      const inCode = this.#marked.at(-1)?.mark.startsWith('`')
      if (open >= 0 && (!inCode || open === this.#marked.length - 1)) this.#marked.splice(open)
      else if (inCode || (token in ELEMENTS && !this.#opens(tokens, place))) this.#append(token)
      else {
        const element = document.createElement(ELEMENTS[token] ?? 'code')
        this.#place().append(element)
        this.#marked.push({ element, mark: token })
      }
    })
  }

  /** Whether asterisks begin an emphasis: they stand before a word, not inside one or between spaces. @param {string[]} tokens @param {number} place */
  #opens(tokens, place) {
    const last = this.#place().lastChild?.textContent?.slice(-1) ?? ''
    return !/\w/.test(last) && !/^(\s|$)/.test(tokens[place + 1] + (tokens[place + 2] ?? ''))
  }

  /** Turn the marks that the line did not close into text. */
  #endLine() {
    for (const { element, mark } of this.#marked.splice(0).reverse()) {
      // One by one, because a call has a limit of arguments.
      element.before(mark)
      while (element.firstChild) element.before(element.firstChild)
      element.remove()
    }
    this.#atLineStart = true
  }

  #place() {
    return this.#marked.at(-1)?.element ?? this.#block ?? this.#root
  }

  /** @param {string} text */
  #append(text) {
    if (!text) return
    const place = this.#place()
    if (place.lastChild instanceof Text) place.lastChild.appendData(text)
    else place.append(text)
  }

  // Code.

  /** @param {string} line @param {string} fence @param {string} language */
  #openCode(line, fence, language) {
    if (!line.startsWith('  ')) this.#lists = []
    const figure = this.#add(cloneTemplate('code'))
    find(figure, '.language', HTMLElement).textContent = language || 'code'
    this.#block = undefined
    this.#code = { element: find(figure, 'code', HTMLElement), text: new Text(), fence }
    this.#codePart(this.#code)
  }

  /** @param {string} line @param {{element: HTMLElement, text: Text, fence: string}} code */
  #codeLine(line, code) {
    const whole = line.endsWith('\n')
    if (this.#atLineStart && !whole && UNDECIDED_CODE.test(line.trim())) return void (this.#held = line)
    if (this.#atLineStart && UNDECIDED_CODE.test(line.trim()) && line.includes(code.fence)) {
      this.#code = undefined
      return
    }
    if (this.#atLineStart && code.text.length > LARGE) this.#codePart(code)
    code.text.appendData(line)
    this.#atLineStart = whole
  }

  /** @param {{text: Text, element: HTMLElement}} code */
  #codePart(code) {
    const part = document.createElement('span')
    code.text = new Text()
    part.append(code.text)
    code.element.append(part)
  }
}
