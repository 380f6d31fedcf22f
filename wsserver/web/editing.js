/** Editing of the last prompt: the box has its text, and the next prompt replaces its turn. */

import { attachmentsOf } from './attachments.js'
import { find, isComposing } from './dom.js'

/** @typedef {import('./compose.js').Composer} Composer */
/** @typedef {import('./turn.js').Turn} Turn */

const bar = find(document, '#editing', HTMLElement)
const hint = find(bar, 'span', HTMLElement)
const box = find(document, '#prompt', HTMLTextAreaElement)

export class Editing {
  /** @type {Turn | undefined} The turn that the next prompt replaces. */ #turn

  /**
   * @param {Composer} composer
   * @param {() => Turn | undefined} last Returns the last turn, if its prompt can be edited.
   */
  constructor(composer, last) {
    this.composer = composer
    this.last = last
    find(bar, 'button', HTMLElement).addEventListener('click', () => this.cancel())
    box.addEventListener('keydown', (event) => {
      if (isComposing(event)) return
      if (event.key === 'Escape' && this.#turn) {
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

  /** @param {Turn} turn @param {string} [text] */
  begin(turn, text = turn.prompt) {
    this.#begin(turn, text, this.composer.edit?.draft ?? box.value)
    this.composer.focus(true)
  }

  /** Continue the editing of a draft that was left. @param {import('./drafts.js').Edit | undefined} edit */
  resume(edit) {
    if (!edit || this.#turn) return
    const turn = this.last()
    if (turn?.id === edit.id) this.#begin(turn, box.value, edit.draft)
    else this.composer.replace([box.value, edit.draft].filter(Boolean).join('\n\n')) // it was overtaken
  }

  /** @param {Turn} turn @param {string} text @param {string} draft What the box had before. */
  #begin(turn, text, draft) {
    this.#turn = turn
    const keeps = attachmentsOf(turn.content ?? '').length ? ' It keeps the attachments.' : ''
    hint.textContent = `Your message replaces the last one and its reply.${keeps}`
    bar.hidden = false
    this.composer.edit = { id: turn.id, draft }
    this.composer.replace(text)
  }

  /** Put the earlier draft back into the box. */
  cancel() {
    if (!this.#turn) return
    this.end()
    this.composer.focus()
  }

  /** End the editing, and return the turn that the prompt replaces. */
  end() {
    const turn = this.#turn
    const { draft = '' } = this.composer.edit ?? {}
    this.suspend()
    if (turn) this.composer.replace(draft)
    return turn
  }

  /** Hide the editing of a conversation that is left. Its draft stays. */
  suspend() {
    this.#turn = this.composer.edit = undefined
    bar.hidden = true
  }

  /**
   * End the editing if the turn can no longer be replaced. A text that the user has changed stays in the box.
   * @param {boolean} [always]
   * @returns {boolean} Whether a text stays.
   */
  leave(always = false) {
    const turn = this.#turn
    if (!turn || (!always && this.last() === turn)) return false
    const text = box.value
    this.end()
    if (!text.trim() || text === turn.prompt) return false
    this.composer.insert(text)
    return true
  }
}
