/** The message box: its text, its draft, its keys and its buttons. */

import { find, isComposing } from './dom.js'
import { keepAtEnd } from './scroll.js'

/** @typedef {import('./drafts.js').Drafts} Drafts */

const form = find(document, '#compose', HTMLFormElement)
const box = find(document, '#prompt', HTMLTextAreaElement)
const send = find(document, '#send', HTMLButtonElement)
const stop = find(document, '#stop', HTMLButtonElement) // while text is typed during a reply
const keys = find(document, '#keys', HTMLElement)
const hovers = matchMedia('(hover: hover)') // on other devices the focus opens the keyboard
const KEYS = keys.textContent ?? ''
export const INTERRUPT = /^(Mac|iP)/.test(navigator.platform) ? '⌘+Enter' : 'Ctrl+Enter'
const BUSY_KEYS = `Enter sends after this reply · ${INTERRUPT} interrupts and sends · Esc stops`

export class Composer {
  /** @type {import('./drafts.js').Edit | undefined} The turn that the text will replace. */ edit
  #busy = false
  /** @type {string | undefined} The conversation of the draft; undefined for a new one. */ #conversation

  /**
   * @param {Drafts} drafts
   * @param {{onSend: (text: string, interrupts: boolean) => void, onStop: () => void}} listener `interrupts`: the
   *   prompt does not wait for the running reply.
   */
  constructor(drafts, listener) {
    this.drafts = drafts
    this.listener = listener
    form.addEventListener('submit', (event) => event.preventDefault())
    send.addEventListener('click', (event) => {
      if (event.detail > 1) return // the second click of a double click must not stop the reply
      if (this.#stops) listener.onStop()
      else this.#submit(false)
      this.focus()
    })
    stop.addEventListener('click', () => {
      listener.onStop()
      this.focus()
    })
    box.addEventListener('input', () => this.#changed())
    box.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || isComposing(event)) return
      event.preventDefault()
      this.#submit(event.ctrlKey || event.metaKey)
    })
  }

  /** Show the draft of a conversation. @param {string | undefined} conversation Undefined for a new one. */
  open(conversation) {
    this.#conversation = conversation
    this.#show(this.drafts.get(conversation))
  }

  /** Keep the text, as the draft of a conversation that begins. @param {string} conversation */
  moveTo(conversation) {
    this.drafts.set(this.#conversation, '')
    this.#conversation = conversation
    this.#keep()
  }

  /** Put text before the text of the box. @param {string} text */
  insert(text) {
    this.#show([text, box.value].filter(Boolean).join('\n\n'))
    this.#keep()
  }

  /** Put text in place of the text of the box. @param {string} text */
  replace(text) {
    this.#show(text)
    this.#keep()
  }

  get text() {
    return box.value
  }

  get isEmpty() {
    return !box.value.trim()
  }

  /** @param {boolean} disabled */
  set disabled(disabled) {
    box.disabled = send.disabled = disabled
  }

  /** Whether a reply runs. @param {boolean} busy */
  set busy(busy) {
    this.#busy = busy
    this.#label()
  }

  /** Focus the box, unless this would open a keyboard on the screen. @param {boolean} [always] */
  focus(always = hovers.matches) {
    if (always) box.focus({ preventScroll: true })
  }

  /** Whether the button stops the reply. */
  get #stops() {
    return this.#busy && this.isEmpty
  }

  /** @param {boolean} interrupts */
  #submit(interrupts) {
    const text = box.value.toWellFormed?.() ?? box.value
    if (!text.trim() || box.disabled) return
    this.#show('')
    this.drafts.set(this.#conversation, '')
    this.listener.onSend(text, interrupts)
  }

  #keep() {
    this.drafts.set(this.#conversation, box.value, this.edit)
  }

  /** @param {string} text */
  #show(text) {
    box.value = text
    this.#grow()
    this.#label()
  }

  #changed() {
    this.#keep()
    this.#grow()
    this.#label()
  }

  #label() {
    send.classList.toggle('stop', this.#stops)
    send.setAttribute('aria-label', this.#stops ? 'Stop' : this.#busy ? 'Send after this reply' : 'Send')
    stop.hidden = !this.#busy || this.isEmpty
    const shown = this.#busy ? BUSY_KEYS : KEYS
    if (keys.textContent !== shown) keys.textContent = shown
  }

  // For browsers without `field-sizing`.
  #grow() {
    if (CSS.supports('field-sizing', 'content')) return
    keepAtEnd(() => {
      box.style.height = 'auto'
      box.style.height = `${box.scrollHeight}px`
    })
  }
}
