/** Code blocks: copying, wrapping, folding. */

import { colour } from './colours.js'
import { cloneTemplate, copy, find } from './dom.js'

const SLICE = 5_000 // characters that are coloured together
const LONG = 40 // lines; longer code of an earlier reply is folded
const PAUSE = 3 // times the time that colouring took, until the last slice is coloured again

/** Return a whole block. @param {string} text @param {string} info What follows the fence. @param {boolean} folds Whether it is folded if it is long. */
export function codeBlock(text, info, folds) {
  const figure = makeFigure(info)
  const code = find(figure, 'code', HTMLElement)
  text = text.replace(/\n+$/, '')
  while (text) {
    const end = endOfSlice(text)
    const slice = document.createElement('span')
    colour(slice, text.slice(0, end), nameOf(info).toLowerCase())
    code.append(slice)
    text = text.slice(end)
  }
  finish(figure, folds)
  return figure
}

/** A fenced block whose end has not arrived. */
export class OpenCode {
  #figure
  #code
  #slice = document.createElement('span')
  #text = '' // of the slice
  #inLine = false // whether the last line has begun
  #due = 0 // when the slice may be coloured again

  /**
   * @param {HTMLElement} root
   * @param {{indent: number, fence: string, info: string}} opening
   * @param {boolean} folds
   */
  constructor(root, { indent, fence, info }, folds) {
    this.info = info
    this.folds = folds
    this.indent = new RegExp(`^ {0,${indent}}`)
    this.closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`)
    this.perhaps = new RegExp(`^ {0,3}${fence[0]}*[ \\t]*$`) // it may become the closing fence
    this.#figure = makeFigure(info)
    this.#code = find(this.#figure, 'code', HTMLElement)
    this.#code.append(this.#slice)
    root.append(this.#figure)
  }

  /** Write some of the source. @param {string} source @returns {{length: number, ended: boolean}} How much was written, and whether the block has ended. */
  write(source) {
    let place = 0
    while (place < source.length && this.#text.length <= SLICE) {
      const end = source.indexOf('\n', place) + 1
      const line = source.slice(place, end || undefined)
      if (!this.#inLine) {
        if (end && this.closing.test(line.slice(0, -1))) {
          this.end()
          return { length: end, ended: true }
        }
        if (!end && this.perhaps.test(line)) break
      }
      this.#append(this.#inLine ? line : line.replace(this.indent, ''))
      this.#inLine = !end
      place += line.length
    }
    this.#colour(this.#text.length > SLICE)
    if (this.#text.length > SLICE) {
      this.#slice = document.createElement('span')
      this.#text = ''
      this.#code.append(this.#slice)
    }
    return { length: place, ended: false }
  }

  end() {
    this.#text = this.#text.replace(/\n+$/, '')
    this.#colour(true)
    finish(this.#figure, this.folds)
  }

  /** @param {string} text */
  #append(text) {
    this.#text += text
    const { lastChild } = this.#slice
    if (lastChild instanceof Text) lastChild.appendData(text)
    else this.#slice.append(text)
  }

  /** @param {boolean} now */
  #colour(now) {
    const began = performance.now()
    if (!now && began < this.#due) return
    colour(this.#slice, this.#text, nameOf(this.info).toLowerCase())
    const end = performance.now()
    this.#due = end + (end - began) * PAUSE
  }
}

/** Return where the first slice of a text ends: after a line, if a line ends early enough. @param {string} text */
function endOfSlice(text) {
  if (text.length <= SLICE) return text.length
  const end = text.lastIndexOf('\n', SLICE) + 1 || SLICE
  return /[\ud800-\udbff]/.test(text[end - 1]) ? end - 1 : end
}

/** Return the language of a block. @param {string} info What follows the fence. */
function nameOf(info) {
  return info.split(/[\s,{]/, 1)[0]
}

/** @param {string} info */
function makeFigure(info) {
  const figure = cloneTemplate('code')
  find(figure, '.language', HTMLElement).textContent = nameOf(info) || 'code'
  return figure
}

/** Let long code be folded. @param {HTMLElement} figure @param {boolean} folded */
function finish(figure, folded) {
  const lines = (find(figure, 'code', HTMLElement).textContent ?? '').split('\n').length
  if (lines <= LONG) return
  const button = find(figure, '.fold', HTMLButtonElement)
  button.hidden = false
  button.dataset.lines = String(lines)
  fold(figure, folded)
}

/** @param {HTMLElement} figure @param {boolean} folded */
function fold(figure, folded) {
  const button = find(figure, '.fold', HTMLButtonElement)
  figure.classList.toggle('folded', folded)
  button.setAttribute('aria-expanded', String(!folded))
  button.textContent = folded ? `Show all ${button.dataset.lines} lines` : 'Show fewer lines'
}

/** Do what a button of a code block is for. @param {Element} target What was clicked. */
export function onCodeButton(target) {
  const button = target.closest('figure.code button')
  const figure = button?.closest('figure')
  if (!(button instanceof HTMLButtonElement) || !(figure instanceof HTMLElement)) return
  if (button.matches('.fold')) fold(figure, !figure.classList.contains('folded'))
  if (button.matches('.wrap')) button.setAttribute('aria-pressed', String(figure.classList.toggle('wrapped')))
  if (!button.matches('.copy-code')) return
  const label = find(button, 'span', HTMLElement)
  copy(find(figure, 'code', HTMLElement).textContent ?? '', (copied) => { label.textContent = copied ? 'Copied' : 'Copy' })
}
