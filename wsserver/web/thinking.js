/** The thinking of a reply: its text, and how long the model thought. */

import { find } from './dom.js'
import { durationOf } from './times.js'

const SECOND = 1_000 // milliseconds

export class Thinking {
  #details
  #summary
  #text
  #seconds = document.createElement('span') // no screen reader tells each second
  #thought = 0 // milliseconds until text arrived
  /** @type {number | undefined} When the thinking began that goes on. */ #began
  /** @type {ReturnType<typeof setInterval> | undefined} */ #timer

  /** @param {HTMLDetailsElement} details */
  constructor(details) {
    this.#details = details
    this.#summary = find(details, 'summary', HTMLElement)
    this.#text = find(details, 'p', HTMLElement)
    this.#seconds.ariaHidden = 'true'
  }

  /** @param {string} text */
  write(text) {
    if (!text) return
    this.#details.hidden = false
    this.#text.append(text)
  }

  /** Count the seconds from now on. */
  count() {
    if (this.#began !== undefined) return
    this.#began = performance.now() // a user may set the clock meanwhile
    this.#summary.replaceChildren('Thinking…', this.#seconds)
    this.#tick()
    this.#timer = setInterval(() => this.#tick(), SECOND)
  }

  /** Count no longer, since text follows or the reply has ended. @param {number} [seconds] How long the model thought, if the server says so. */
  end(seconds) {
    if (this.#began !== undefined) this.#thought += performance.now() - this.#began
    this.#began = undefined
    clearInterval(this.#timer)
    // A page that got the thinking late, or at once, knows no duration.
    seconds ??= this.#thought < SECOND ? undefined : this.#thought / SECOND
    const shown = seconds === undefined ? 'Thought' : `Thought for ${durationOf(seconds)}`
    if (this.#summary.textContent !== shown) this.#summary.textContent = shown
  }

  /** Remove the text. */
  clear() {
    this.end()
    this.#thought = 0
    this.#text.textContent = ''
    this.#details.hidden = true
  }

  #tick() {
    const passed = this.#thought + performance.now() - (this.#began ?? 0)
    this.#seconds.textContent = passed < SECOND ? '' : ` ${durationOf(passed / SECOND)}`
  }
}
