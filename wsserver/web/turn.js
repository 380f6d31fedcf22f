/** One turn on the page: a prompt and its reply. */

import { attachmentsOf, isEditable, showAttachments, textOf } from './attachments.js'
import { cloneTemplate, copy, find } from './dom.js'
import { showReference } from './errors.js'
import { Markdown } from './markdown.js'
import { Thinking } from './thinking.js'
import { showTime } from './times.js'
import { describeEnd, describePartial, describeUsage, isFailure, UNSENT_BY } from './wording.js'

/** @typedef {import('./client.js').Reply} Reply */
/** @typedef {import('./client.js').ReplyError} ReplyError */
/** @typedef {import('./client.js').Result} Result */
/** @typedef {import('./client.js').Message} Message */
/** @typedef {import('./attachments.js').Content} Content */
/** @typedef {{prompt?: Content, reply?: Message, began?: number}} SavedTurn A turn of a history. `began`: when its prompt was sent, in seconds since 1970. */

const LONG = { lines: 20, characters: 2_000 } // a longer prompt is folded
const FRAME_TEXT = 6_000 // characters added per animation frame, so that no frame takes long
const RETRYABLE = [ // codes of errors, and causes of a stop, after which a retry can succeed
  'rate_limited', 'overloaded', 'upstream_error', 'unreachable', 'incomplete', 'malformed', 'interrupted', 'internal', 'timeout', 'disconnect', 'shutdown',
]
const REPLY_GONE = ['not_found', 'forgotten'] // codes of errors after which only the history may have the reply

export class Turn {
  /** @type {Reply | undefined} The reply, until it has ended. */ reply
  /** @type {string | undefined} The id of the turn that this one replaces. */ retryOf
  element = cloneTemplate('turn')
  /** @type {Content | undefined} What a retry sends; undefined if another client sent blocks that the page does not have. */ content
  #prompt = find(this.element, '.you p', HTMLElement)
  #fold = find(this.element, '.fold', HTMLButtonElement)
  #attachments = find(this.element, '.attachments', HTMLElement)
  #queue = find(this.element, '.queue', HTMLElement)
  #reply = find(this.element, '.reply', HTMLElement)
  #thinking = new Thinking(find(this.element, 'details', HTMLDetailsElement))
  #text = find(this.element, '.text', HTMLElement)
  #note = find(this.element, '.note', HTMLElement)
  #reference = find(this.element, '.reference', HTMLButtonElement)
  #usage = find(this.element, '.usage', HTMLElement)
  #sent = find(this.element, '.sent', HTMLElement)
  #endedAt = find(this.element, '.ended', HTMLElement)
  #copy = find(this.element, '.copy', HTMLButtonElement)
  #retry = find(this.element, '.retry', HTMLButtonElement)
  #regenerate = find(this.element, '.regenerate', HTMLButtonElement)
  #rewrite = find(this.element, '.rewrite', HTMLButtonElement)
  #markdown = new Markdown(this.#text)
  /** Number of characters that are on the page. */ #drawn = { text: 0, thinking: 0 }
  /** @type {{result?: Result, error?: ReplyError} | undefined} How the reply ended. */ #end
  /** @type {number | undefined} The animation frame that will draw. */ #frame
  /** @type {ReturnType<typeof setInterval> | undefined} Of the retry button. */ #countdown
  #started = false
  #ended = false
  #waits = false
  #waitingNote = ''
  #wholeText = '' // of an ended reply

  /**
   * @param {string} id
   * @param {{onRetry: (turn: Turn) => void, onEnd: (turn: Turn, note: string) => void, onEdit: (turn: Turn) => void, onRemove: (turn: Turn) => void, onRewrite: (turn: Turn) => void}} listener
   *   `onEdit`, `onRemove`: the user takes back a prompt that has no reply. `onRewrite`: the user edits a
   *   prompt that has one.
   */
  constructor(id, listener) {
    this.id = id
    this.listener = listener
    this.#copy.addEventListener('click', () => copy(this.#wholeText, (copied) => {
      this.#copy.classList.toggle('done', copied)
      this.#copy.ariaLabel = copied ? 'Copied' : 'Copy the reply'
    }))
    find(this.element, '.edit', HTMLElement).addEventListener('click', () => listener.onEdit(this))
    find(this.element, '.remove', HTMLElement).addEventListener('click', () => listener.onRemove(this))
    this.#fold.addEventListener('click', () => this.#foldPrompt(!this.#prompt.classList.contains('folded')))
    this.#rewrite.addEventListener('click', () => listener.onRewrite(this))
    this.#regenerate.addEventListener('click', () => listener.onRetry(this))
    this.#retry.addEventListener('click', () => {
      if (this.#retry.getAttribute('aria-disabled') !== 'true') listener.onRetry(this)
    })
  }

  /** The text of a reply that has ended. */
  get text() {
    return this.#wholeText
  }

  /** The error with which the reply failed. */
  get error() {
    return this.#end?.error
  }

  /** Whether the server refused the prompt, so that the conversation has no such turn. */
  get refused() {
    return this.error !== undefined && !this.#started
  }

  /** Whether only the history may have the reply. */
  get isGone() {
    return REPLY_GONE.includes(this.error?.code ?? '')
  }

  /** Whether the model never got the prompt, so that the conversation has no such turn. */
  get isUnsent() {
    const result = this.#end?.result
    if (result?.reason !== 'stopped' || this.#wholeText || !UNSENT_BY.has(result.by ?? '')) return false
    return result.usage ? !result.usage.input_tokens : !this.#started
  }

  /** Whether another client took the prompt back before it had a reply. */
  get isTakenBack() {
    const { by, usage } = this.#end?.result ?? {}
    return this.isUnsent && by === 'client' && usage !== undefined
  }

  /** Whether the conversation has the turn, so that another prompt can replace it. */
  get isReplaceable() {
    return this.#ended && this.content !== undefined && !this.refused && !this.isUnsent && this.#end?.result?.saved !== false
  }

  /** Whether the user can write another text for the prompt. */
  get isEditable() {
    return this.isReplaceable && isEditable(this.content ?? '')
  }

  /** Whether the prompt waits for the reply above. @param {boolean} waits */
  set waits(waits) {
    if (this.#waits === waits) return
    this.#waits = waits
    this.#showQueue()
  }

  /** The text of the prompt. */
  get prompt() {
    return this.#prompt.textContent ?? ''
  }

  /** @param {Content} content */
  setPrompt(content) {
    if (typeof content === 'string' && content === this.content) return
    this.content = content
    this.#writePrompt(textOf(content))
    showAttachments(this.#attachments, attachmentsOf(content))
    this.#offerReplacement()
  }

  /** @param {number | undefined} sent @param {number} [ended] In seconds since 1970; undefined changes nothing. */
  showTimes(sent, ended) {
    showTime(this.#sent, sent)
    showTime(this.#endedAt, ended)
  }

  /** Whether the page shows all text of a turn in a history. @param {SavedTurn} saved */
  shows({ reply }) {
    if (!this.#ended) return this.reply !== undefined
    return reply?.partial === 'cut' || (this.#wholeText === (reply?.content ?? '') && !this.isGone)
  }

  /** Show a turn of a history. @param {SavedTurn} saved */
  showSaved({ prompt, reply, began }) {
    const { content: text = '', thinking = '', partial, model, usage, thought, ended } = reply ?? {}
    if (prompt !== undefined) this.setPrompt(prompt)
    this.#end = undefined
    this.#clear()
    this.#markdown = new Markdown(this.#text, true)
    this.#thinking.write(thinking)
    this.#thinking.end(thought)
    this.#markdown.write(text)
    this.#wholeText = text
    this.#usage.textContent = describeUsage(model, usage)
    this.showTimes(began, ended)
    const note = partial ? describePartial(partial) : text ? '' : 'There is no reply.'
    const failed = partial !== undefined && isFailure(partial)
    this.#finish(note, failed)
    showReference(this.#reference, failed ? this.id : undefined) // the log has the id of the reply, too
    if (partial !== undefined && RETRYABLE.includes(partial)) this.#offerRetry(0)
    this.#offerReplacement()
  }

  /** Show a running reply. @param {Reply} reply */
  follow(reply) {
    this.reply = reply
    this.retryOf = reply.retryOf
    this.#showPrompt(reply)
    const drawSoon = () => { this.#frame ??= requestAnimationFrame(() => this.#draw()) }
    reply.addEventListener('change', () => {
      if (this.reply === reply) drawSoon()
    })
    reply.done.then((result) => { this.#end = { result } }, (error) => { this.#end = { error } }).then(drawSoon)
    drawSoon()
  }

  /** Remove the turn from the page. The reply continues. */
  remove() {
    this.reply = undefined
    if (this.#frame !== undefined) cancelAnimationFrame(this.#frame)
    clearInterval(this.#countdown)
    this.#thinking.end()
    this.element.remove()
  }

  /** Show why no text arrives now; an empty note if text may arrive. @param {string} note */
  setWaiting(note) {
    this.#waitingNote = note
    if (this.reply && !this.reply.ended) this.#setNote(note)
    this.#showQueue()
  }

  /** Hide the retry button, since only the last turn can be retried. */
  hideRetry() {
    clearInterval(this.#countdown)
    this.#retry.hidden = true
    this.#offerReplacement()
  }

  #draw() {
    this.#frame = undefined
    const { reply } = this
    if (!reply) return
    // After a crash the server may have less text than the page shows.
    if (reply.text.length < this.#drawn.text || reply.thinking.length < this.#drawn.thinking) this.#clear()
    const drawn = this.#drawn
    this.#showPrompt(reply)
    const thinking = reply.thinking.slice(drawn.thinking, drawn.thinking + FRAME_TEXT)
    if (thinking) {
      this.#thinking.write(thinking)
      this.#thinking.count()
      drawn.thinking += thinking.length
    }
    const text = reply.text.slice(drawn.text, drawn.text + FRAME_TEXT)
    if (text) {
      this.#thinking.end()
      this.#markdown.write(text)
      drawn.text += text.length
    }
    const all = drawn.text === reply.text.length && drawn.thinking === reply.thinking.length
    if (!all) this.#frame = requestAnimationFrame(() => this.#draw())
    else if (this.#end) this.#showEnd(reply, this.#end)
    else this.#setNote(this.#waitingNote)
  }

  /** Show the prompt of a running reply that another client asked for. @param {Reply} reply */
  #showPrompt({ prompt, promptBlocks }) {
    if (prompt === undefined || this.content !== undefined) return
    if (!promptBlocks) return this.setPrompt(prompt)
    if (!this.#attachments.hidden) return
    this.#writePrompt(prompt)
    showAttachments(this.#attachments, attachmentsOf(promptBlocks.map((type) => ({ type }))))
  }

  /** @param {string} text */
  #writePrompt(text) {
    if (text === this.prompt) return // a reader may have unfolded it
    this.#prompt.textContent = text
    const long = text.length > LONG.characters || text.split('\n').length > LONG.lines
    this.#fold.hidden = !long
    this.#foldPrompt(long)
  }

  /** @param {boolean} folded */
  #foldPrompt(folded) {
    this.#prompt.classList.toggle('folded', folded)
    this.#fold.ariaExpanded = String(!folded)
    this.#fold.textContent = folded ? 'Show the whole message' : 'Show less'
  }

  /** Show why the prompt has no reply, or the reply. */
  #showQueue() {
    const { isUnsent } = this
    const waits = this.#waits && this.reply !== undefined
    const why = waits ? (this.#waitingNote ? 'Waits for the connection.' : 'Waits for the reply above.') : ''
    find(this.#queue, 'span', HTMLElement).textContent = isUnsent ? UNSENT_BY.get(this.#end?.result?.by ?? '') ?? '' : why
    find(this.#queue, '.edit', HTMLElement).hidden = typeof this.content !== 'string' // the box has no attachments
    this.#queue.hidden = !waits && !isUnsent
    this.#reply.hidden = !this.#queue.hidden
  }

  /** Remove all text and thinking. */
  #clear() {
    this.#text.textContent = ''
    this.#markdown = new Markdown(this.#text)
    this.#thinking.clear()
    this.#drawn = { text: 0, thinking: 0 }
  }

  /** @param {Reply} reply @param {{result?: Result, error?: ReplyError}} end */
  #showEnd(reply, { result, error }) {
    this.reply = undefined
    this.#wholeText = reply.text
    this.#started = reply.started
    this.#thinking.end((result ?? error)?.thought)
    this.showTimes(undefined, Date.now() / 1000)
    if (error) {
      this.#finish(error.message, true)
      showReference(this.#reference, error.ref)
      if (error.retryable || RETRYABLE.includes(error.code)) this.#offerRetry(error.retryAfter ?? 0)
    } else this.#finish(result ? describeEnd(result) : '', result?.saved === false)
    if (RETRYABLE.includes(result?.by ?? '')) this.#offerRetry(0)
    this.#showQueue()
    this.#offerReplacement()
    this.#usage.textContent = describeUsage(reply.model, result?.usage ?? error?.usage)
    this.listener.onEnd(this, this.#note.textContent ?? '')
  }

  /** @param {string} note @param {boolean} isError */
  #finish(note, isError) {
    this.#ended = true
    const markdown = this.#markdown
    markdown.end().then(() => { // all text is on the page
      if (markdown === this.#markdown) this.#reply.setAttribute('aria-busy', 'false')
    })
    this.#setNote(note, isError)
    this.#copy.hidden = !this.#wholeText
  }

  /** @param {string} note @param {boolean} [isError] */
  #setNote(note, isError = false) {
    if (this.#note.textContent !== note) this.#note.textContent = note
    this.#note.classList.toggle('wrong', isError)
    this.#text.classList.toggle('writing', this.reply !== undefined && !note)
  }

  /** Show the buttons that replace the turn. The style sheet hides them in all turns but the last. */
  #offerReplacement() {
    this.#rewrite.hidden = !this.isEditable
    this.#regenerate.hidden = !this.isReplaceable || !this.#retry.hidden
  }

  /** Show the retry button. @param {number} after Seconds until it can be used. */
  #offerRetry(after) {
    const due = Date.now() + after * 1000
    const update = () => {
      const left = Math.ceil((due - Date.now()) / 1000)
      this.#retry.textContent = left > 0 ? `Retry in ${left < 100 ? `${left} s` : `${Math.ceil(left / 60)} min`}` : 'Retry'
      this.#retry.setAttribute('aria-disabled', String(left > 0))
      if (left <= 0) clearInterval(this.#countdown)
    }
    this.#retry.hidden = false
    this.#countdown = setInterval(update, 1000)
    update()
  }
}
