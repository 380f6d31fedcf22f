/** Editing of the last prompt: the box has its text, and the next prompt replaces its turn. */

import { isComposing } from './compose.js'
import { find } from './dom.js'

/** @typedef {import('./compose.js').Composer} Composer */
/** @typedef {import('./turn.js').Turn} Turn */

const bar = find(document, '#editing', HTMLElement)
const box = find(document, '#prompt', HTMLTextAreaElement)

export class Editing {
  /** @type {string | undefined} The id of the turn that the next prompt replaces. */ #id
  #draft = '' // what the box had before

  /**
   * @param {Composer} composer
   * @param {() => Turn | undefined} last Returns the last turn, if a prompt can replace it.
   */
  constructor(composer, last) {
    this.composer = composer
    find(bar, 'button', HTMLElement).addEventListener('click', () => this.cancel())
    box.addEventListener('keydown', (event) => {
      if (isComposing(event)) return
      if (event.key === 'Escape' && this.#id !== undefined) {
        event.preventDefault() // stops no reply
        this.cancel()
      } else if (event.key === 'ArrowUp' && !box.value && !event.shiftKey && !event.altKey && !event.ctrlKey && !event.metaKey) {
        const turn = last()
        if (!turn) return
        event.preventDefault()
        this.begin(turn)
      }
    })
  }

  /** @param {Turn} turn */
  begin(turn) {
    if (this.#id === undefined) this.#draft = box.value
    this.#id = turn.id
    bar.hidden = false
    this.composer.replace(turn.prompt)
    this.composer.focus(true)
  }

  /** Put the earlier draft back into the box. */
  cancel() {
    if (this.#id === undefined) return
    this.end()
    this.composer.focus()
  }

  /** End the editing, and return the id of the turn that the prompt replaces. */
  end() {
    const id = this.#id
    if (id !== undefined) this.composer.replace(this.#draft)
    this.#id = undefined
    this.#draft = ''
    bar.hidden = true
    return id
  }
}
