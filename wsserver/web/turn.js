/** One prompt and its reply, on the page. */

import { ReplyError } from './client.js'
import { copy, copyOf, find } from './dom.js'
import { Formatter } from './format.js'

/** @typedef {import('./client.js').Reply} Reply */
/** @typedef {import('./client.js').Result} Result */
/** @typedef {{prompt?: string, text: string, partial?: string}} Told A turn as a history tells it. */

const MOST = 6_000 // characters that are shown in one frame, so that no frame takes long
const BY = /** @type {Record<string, string>} */ ({
  client: 'Stopped.',
  disconnect: 'Stopped, as the connection was lost.',
  replaced: 'Stopped for another prompt.',
  timeout: 'Stopped, as it took too long.',
  shutdown: 'Stopped, as the server shut down.',
})
const WHY = /** @type {Record<string, string>} */ ({
  ...BY,
  cut: 'Shortened here, as it is too long to be sent again.',
  interrupted: 'Broken off, as the server went away.',
  refusal: 'The model declined to go on.',
})
// Codes of errors that another try can mend.
const PASSING = [
  'rate_limited', 'overloaded', 'upstream_error', 'unreachable', 'incomplete', 'malformed', 'interrupted',
]
// Codes of errors after which only the conversation's history knows the reply.
export const GONE = ['not_found', 'forgotten']
const count = new Intl.NumberFormat('en')

export class Turn {
  /** @type {Reply | undefined} What it shows, while that is not over. */ reply
  /** @type {string | undefined} The id of the turn whose place this one takes, once it has started. */ retryOf
  element = copyOf('turn')
  #prompt = find(this.element, '.you p', HTMLElement)
  #shown = find(this.element, '.reply', HTMLElement)
  #details = find(this.element, 'details', HTMLDetailsElement)
  #summary = find(this.element, 'summary', HTMLElement)
  #thinking = find(this.element, 'details p', HTMLElement)
  #text = find(this.element, '.text', HTMLElement)
  #note = find(this.element, '.note', HTMLElement)
  #usage = find(this.element, '.usage', HTMLElement)
  #copy = find(this.element, '.copy', HTMLButtonElement)
  #retry = find(this.element, '.retry', HTMLButtonElement)
  #formatter = new Formatter(this.#text)
  /** @type {{text: number, thinking: number}} Characters that are on the page. */ #drawn = { text: 0, thinking: 0 }
  /** @type {{result?: Result, error?: ReplyError} | undefined} How it ended. */ #end
  /** @type {number | undefined} */ #frame
  /** @type {ReturnType<typeof setInterval> | undefined} */ #countdown
  #started = false
  #over = false
  #waiting = ''
  #said = '' // all of the text, for a copy

  /**
   * @param {string} id
   * @param {{retry: (turn: Turn) => void, ended: (turn: Turn, words: string) => void}} told
   */
  constructor(id, told) {
    this.id = id
    this.told = told
    this.#copy.addEventListener('click', () => {
      copy(this.#said)
      this.#copy.classList.add('done')
      this.#copy.setAttribute('aria-label', 'Copied')
      setTimeout(() => {
        this.#copy.classList.remove('done')
        this.#copy.setAttribute('aria-label', 'Copy the reply')
      }, 2000)
    })
    this.#retry.addEventListener('click', () => {
      if (this.#retry.getAttribute('aria-disabled') !== 'true') told.retry(this)
    })
  }

  /** All that it says, once it is over. */
  get text() {
    return this.#said
  }

  /** Why it failed. */
  get error() {
    return this.#end?.error
  }

  /** Whether the server did not accept it, so that nothing of it is there. */
  get refused() {
    return this.error !== undefined && !this.#started
  }

  /** What was asked, where that is known. */
  get prompt() {
    return this.#prompt.textContent ?? ''
  }

  /** Whether a history tells less than is here, or the same. @param {Told} told */
  has({ text, partial }) {
    if (!this.#over) return this.reply !== undefined
    return partial === 'cut' || (this.#said === text && !GONE.includes(this.error?.code ?? ''))
  }

  /** Show what is over. @param {Told} told */
  tell({ prompt, text, partial }) {
    if (prompt !== undefined) this.#prompt.textContent = prompt
    this.#end = undefined
    this.#text.textContent = ''
    this.#formatter = new Formatter(this.#text)
    this.#formatter.write(text)
    this.#said = text
    const why = partial ? (WHY[partial] ?? `Broken off by an error (${partial.replaceAll('_', ' ')}).`) : text ? '' : 'There is no reply.'
    this.#finish(why, partial !== undefined && !(partial in BY) && partial !== 'cut')
    if (partial !== undefined && PASSING.includes(partial)) this.#offer(0)
  }

  /** Show what is under way. @param {Reply} reply */
  follow(reply) {
    this.reply = reply
    this.retryOf = reply.retryOf
    if (reply.prompt !== undefined) this.#prompt.textContent = reply.prompt
    const soon = () => { this.#frame ??= requestAnimationFrame(() => this.#draw()) }
    reply.addEventListener('change', () => {
      if (this.reply === reply) soon()
    })
    reply.done.then((result) => { this.#end = { result } }, (error) => { this.#end = { error } }).then(soon)
    soon()
  }

  /** Leave the page; the reply goes on. */
  leave() {
    this.reply = undefined
    if (this.#frame !== undefined) cancelAnimationFrame(this.#frame)
    clearInterval(this.#countdown)
    this.element.remove()
  }

  /** Say why nothing comes at the moment; the reply's own words if there is no reason. @param {string} why */
  wait(why) {
    this.#waiting = why
    if (this.reply && !this.reply.ended) this.#say(why)
  }

  /** No longer offer to try again, as something else was asked since. */
  settle() {
    clearInterval(this.#countdown)
    this.#retry.hidden = true
  }

  #draw() {
    this.#frame = undefined
    const { reply } = this
    if (!reply) return
    if (reply.text.length < this.#drawn.text || reply.thinking.length < this.#drawn.thinking) this.#clear() // the server lost a part
    const drawn = this.#drawn
    if (reply.prompt !== undefined && !this.prompt) this.#prompt.textContent = reply.prompt
    if (reply.thinking.length > drawn.thinking) {
      this.#details.hidden = false
      const thought = reply.thinking.slice(drawn.thinking, drawn.thinking + MOST)
      this.#thinking.append(thought)
      drawn.thinking += thought.length
    }
    const text = reply.text.slice(drawn.text, drawn.text + MOST)
    if (text) {
      this.#summary.textContent = 'Thought'
      this.#formatter.write(text)
      drawn.text += text.length
    }
    const all = drawn.text === reply.text.length && drawn.thinking === reply.thinking.length
    if (!all) this.#frame = requestAnimationFrame(() => this.#draw())
    else if (this.#end) this.#close(reply, this.#end)
    else this.#say(reply.queued ? 'Waiting for its turn.' : this.#waiting)
  }

  /** Show no text and no thinking. */
  #clear() {
    this.#text.textContent = this.#thinking.textContent = ''
    this.#formatter = new Formatter(this.#text)
    this.#details.hidden = true
    this.#drawn = { text: 0, thinking: 0 }
  }

  /** @param {Reply} reply @param {{result?: Result, error?: ReplyError}} end */
  #close(reply, { result, error }) {
    this.reply = undefined
    this.#said = reply.text
    this.#started = reply.started
    this.#summary.textContent = 'Thought'
    if (error) {
      this.#finish(error.message, true)
      if (error.retryable) this.#offer(error.retryAfter ?? 0)
    } else this.#finish(result ? ending(result) : '', result?.saved === false)
    this.#usage.textContent = used(reply.model, result?.usage ?? error?.usage)
    this.told.ended(this, this.#note.textContent ?? '')
  }

  /** @param {string} note @param {boolean} wrong */
  #finish(note, wrong) {
    this.#over = true
    this.#formatter.end()
    this.#shown.setAttribute('aria-busy', 'false')
    this.#say(note, wrong)
    this.#copy.hidden = !this.#said
  }

  /** @param {string} words @param {boolean} [wrong] */
  #say(words, wrong = false) {
    if (this.#note.textContent !== words) this.#note.textContent = words
    this.#note.classList.toggle('wrong', wrong)
    this.#text.classList.toggle('writing', this.reply !== undefined && !words)
  }

  /** Let it be tried again. @param {number} after In seconds. */
  #offer(after) {
    const due = Date.now() + after * 1000
    const tick = () => {
      const left = Math.ceil((due - Date.now()) / 1000)
      this.#retry.textContent = left > 0 ? `Retry in ${left < 100 ? `${left} s` : `${Math.ceil(left / 60)} min`}` : 'Retry'
      this.#retry.setAttribute('aria-disabled', String(left > 0))
      if (left <= 0) clearInterval(this.#countdown)
    }
    this.#retry.hidden = false
    this.#countdown = setInterval(tick, 1000)
    tick()
  }
}

/** @param {Result} result */
function ending({ reason, by = '', saved }) {
  const lost = saved === false ? ' It could not be saved.' : ''
  if (reason === 'stopped') return (BY[by] ?? 'Stopped.') + lost
  if (reason === 'max_tokens') return `Cut short, as it reached the longest length allowed.${lost}`
  const whole = ['end_turn', 'stop_sequence'].includes(reason)
  return ((whole ? '' : `Ended early: ${reason.replaceAll('_', ' ')}.`) + lost).trim()
}

/** @param {string | undefined} model @param {Record<string, any> | undefined} usage */
function used(model, usage) {
  const said = model === undefined ? [] : [model]
  if (usage) {
    const { input_tokens: own = 0, output_tokens: output = 0, estimated } = usage
    const input = own + (usage.cache_creation_input_tokens ?? 0) + (usage.cache_read_input_tokens ?? 0)
    said.push(`${count.format(input)} tokens in, ${estimated ? 'about ' : ''}${count.format(output)} out`)
  }
  return said.join(' · ')
}
