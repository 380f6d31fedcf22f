/** The turns on the page: of a history, and of replies that run. */

import { newId } from './client.js'
import { onCodeButton } from './code.js'
import { find } from './dom.js'
import { keepInPlace, stayHere } from './scroll.js'
import { Turn } from './turn.js'

/** @typedef {import('./client.js').History} History */
/** @typedef {import('./client.js').Reply} Reply */

const log = find(document, '#log', HTMLElement)
const older = find(document, '#older', HTMLButtonElement)

log.addEventListener('click', (event) => {
  const { target } = event
  if (!(target instanceof Element)) return
  if (target.closest('summary')) stayHere()
  onCodeButton(target)
  const link = target.closest('a[href^="#"]')
  if (link) { // of a footnote; the address keeps the hash of the conversation
    event.preventDefault()
    document.getElementById(link.getAttribute('href')?.slice(1) ?? '')?.scrollIntoView({ block: 'center' })
  }
})

/** The turns of one conversation. An iteration yields each {@link Turn}. */
export class Turns {
  /** @type {Map<string, Turn>} */ #turns = new Map()
  /** @type {number | undefined} The `before` of the earlier messages, if there are any. */ #before

  /** @param {ConstructorParameters<typeof Turn>[1]} listener Of each turn. */
  constructor(listener) {
    this.listener = listener
  }

  [Symbol.iterator]() {
    return this.#turns.values()
  }

  get size() {
    return this.#turns.size
  }

  /** The last turn on the page. */
  get last() {
    return [...this].find(({ element }) => element === log.lastElementChild)
  }

  /** The first reply that runs or waits. */
  get running() {
    for (const { reply } of this) if (reply && !reply.ended) return reply
    return undefined
  }

  /** The point before which the server has earlier messages; undefined if it has none. */
  get before() {
    return this.#before
  }

  set before(before) {
    this.#before = before
    older.hidden = before === undefined
  }

  /** @param {string} id */
  get(id) {
    return this.#turns.get(id)
  }

  /** Add a turn after all others. @param {string} id */
  append(id) {
    const turn = this.#add(id)
    log.append(turn.element)
    return turn
  }

  /** Show the turns of a history. A turn that the page shows as a whole stays. @param {History['messages']} messages */
  show(messages) {
    this.#insert(messages, log.firstElementChild)
  }

  /**
   * Return the turns that another client has replaced, and all that a long history does not reach.
   * @param {History['messages']} messages
   * @param {Reply[]} replies
   */
  replacedBy(messages, replies) {
    if (!messages.length) return []
    const known = new Set([...messages, ...replies].map(({ id }) => id))
    const first = messages.map(({ id = '' }) => this.get(id)?.element).find((element) => element !== undefined)
    return [...this].filter(({ id, element, isReplaceable }) => {
      const isEarlier = first && element.compareDocumentPosition(first) & Node.DOCUMENT_POSITION_FOLLOWING
      return isReplaceable && !isEarlier && !known.has(id)
    })
  }

  /** Show earlier messages, and keep the other turns in their place on the screen. @param {History} history */
  showEarlier({ messages, before }) {
    const first = log.firstElementChild
    keepInPlace(first, () => {
      this.before = before
      this.#insert(messages, first)
    })
  }

  /** Show which prompts wait for a reply above. */
  showQueue() {
    let busy = false
    for (const turn of this) {
      turn.waits = busy
      busy ||= turn.reply !== undefined && !turn.reply.ended
    }
  }

  hideRetries() {
    for (const turn of this) turn.hideRetry()
  }

  /** @param {Turn} turn */
  remove(turn) {
    turn.remove()
    this.#turns.delete(turn.id)
  }

  clear() {
    for (const turn of this) this.remove(turn)
    this.before = undefined
  }

  /** @param {string} id */
  #add(id) {
    const turn = new Turn(id, this.listener)
    this.#turns.set(id, turn)
    return turn
  }

  /** @param {History['messages']} messages @param {Element | null} place The element before which the first new turn goes. */
  #insert(messages, place) {
    /** @type {Map<string, import('./turn.js').SavedTurn>} */
    const saved = new Map()
    for (const message of messages) {
      const { role, content, id = newId(), began } = message
      const turn = saved.get(id) ?? {}
      if (role === 'user') turn.prompt = message.blocks ?? content
      else turn.reply = message
      turn.began ??= began
      saved.set(id, turn)
    }
    for (const [id, each] of saved) {
      let turn = this.get(id)
      if (turn) place = turn.element.nextElementSibling
      else log.insertBefore((turn = this.#add(id)).element, place)
      if (!turn.shows(each)) turn.showSaved(each)
      else {
        if (each.prompt !== undefined) turn.setPrompt(each.prompt)
        turn.showTimes(each.began, each.reply?.ended)
      }
    }
    for (const turn of this) if (saved.has(turn.id) && turn.element.nextElementSibling) turn.hideRetry()
  }
}
