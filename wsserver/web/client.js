/**
 * A client of wsserver, for browsers and for Node 22 and later. It needs nothing else: copy it.
 *
 * ```js
 * import { connect } from './client.js'
 * const chat = connect('wss://chat.example.com/ws', { token: () => fetchToken() })
 * const reply = chat.prompt('Hello')
 * for await (const text of reply) output.append(text)
 * ```
 *
 * It connects again by itself, and goes on with each reply exactly after what has arrived of it.
 * Text is only ever text: put it into a page with `textContent` or `append`, never as HTML.
 */

/**
 * @typedef {object} Options
 * @property {string | (() => string | Promise<string>)} [token] Says who the client is. A function
 *   is asked for a fresh one for each connection, and before the last one expires.
 * @property {string} [conversation] The one that goes on; default: a new one.
 * @property {any} [WebSocket] The class, where there is no global one.
 * @property {number} [heartbeat] Milliseconds between looks at whether the connection still lives.
 * @property {number} [firstPause] Milliseconds, the bound of the pause before the first new attempt
 *   to connect. It doubles with each failure; the pause is random below it.
 * @property {number} [longestPause] Milliseconds, which the bound does not exceed.
 *
 * @typedef {object} PromptOptions
 * @property {string} [id] Of the reply; default: a random one. What has this id and has not ended is
 *   what one gets.
 * @property {string} [conversation] Default: that of the chat.
 * @property {'reject' | 'queue' | 'interrupt'} [onBusy] What to do if the conversation is
 *   generating: fail with `busy` (the default), wait, or stop what runs.
 * @property {string} [model]
 * @property {string} [system]
 * @property {number} [maxTokens]
 * @property {number} [temperature]
 *
 * @typedef {object} Result How a reply ended.
 * @property {string} reason The model's own, or `stopped`.
 * @property {string} [by] Who stopped it.
 * @property {Record<string, any>} [usage] Not there if it was stopped without a connection.
 * @property {boolean} [saved] Whether the server saved it; not there if `usage` is not.
 *
 * @typedef {{role: 'user' | 'assistant', content: string, id?: string, partial?: string}} Message
 * @typedef {{id: string, title: string, created: number, updated: number}} Item
 * @typedef {object} History
 * @property {string} conversation
 * @property {string} title
 * @property {Message[]} messages Oldest first, without those of what still runs.
 * @property {Reply[]} replies What runs or waits.
 * @property {number} [before] There are older messages: `open` with it gets them.
 *
 * @typedef {'connecting' | 'open' | 'waiting' | 'idle' | 'unauthenticated' | 'closed'} State
 *   `waiting`: for the next attempt to connect. `idle`: the server closed, as there was nothing to
 *   do; whatever is asked next connects again. `unauthenticated`: `setToken` connects again.
 *   `closed`: by `close`, or by a server that does not want this client.
 * @typedef {Record<string, any>} Frame
 * @typedef {{state: {state: State, code?: number, reason?: string}, reply: Reply, history: History, deleted: {conversation: string}, message: Frame, error: unknown}} Events
 * @typedef {{frame: Frame, sent: number, resolve: (value: any) => void, reject: (why: ReplyError) => void}} Request
 */

const OPEN = 1 // of WebSocket.readyState
const CONNECT_TIMEOUT = 15_000, WAKE_TIMEOUT = 5_000 // milliseconds
const RENEW_BEFORE = 60_000, LEAST_RENEWAL = 5_000, LONGEST_TIMER = 2 ** 31 - 1 // milliseconds
const RETRY = 1 // seconds, where the server does not tell
const REFUSED_FOR_GOOD = [1002, 1007, 1008] // close codes after which there is no coming back

/** What the server answers with `error`; `code` is one of the protocol's, or `closed`. */
export class ReplyError extends Error {
  /** @param {Frame} frame */
  constructor({ code, message, retryable = false, retry_after, ref, usage }) {
    super(message)
    this.name = 'ReplyError'
    /** @type {string} */ this.code = code
    /** @type {boolean} Whether the same can succeed later. */ this.retryable = retryable
    /** @type {number | undefined} In how many seconds. */ this.retryAfter = retry_after
    /** @type {string | undefined} Finds the line in the server's log. */ this.ref = ref
    /** @type {Record<string, any> | undefined} */ this.usage = usage
  }
}

/**
 * A reply, usable from the moment at which it is asked for. To iterate gives its text, from the
 * beginning, in whatever pieces have come since the last step; it throws what `done` rejects with.
 * A `change` event tells of everything new.
 */
export class Reply extends EventTarget {
  text = ''
  thinking = ''
  /** Whether the server has accepted it. */
  started = false
  /** Whether `done` is settled. */
  ended = false
  /** @type {string | undefined} */ model
  /** @type {number | undefined} Its place behind others, as it was accepted; until it begins. */ queued
  /** @type {number} Of the last piece that is here; `resume` elsewhere can go on after it. */ seq = 0

  /** @internal @type {number} How many `start`s come before its frames follow on what is here. */ _starts = 0
  /** @internal */ _sent = false
  /** @internal Whether it was sent by itself, after a connection was made. */ _late = false
  /** @internal */ _stopping = false
  /** @type {Set<{text: string, wake: () => void}>} */ #readers = new Set()
  /** @type {{resolve: (result: Result) => void, reject: (error: ReplyError) => void} | undefined} */ #settle
  #stop

  /**
   * @internal
   * @param {string} id
   * @param {string | undefined} conversation
   * @param {string | undefined} prompt
   * @param {Frame | undefined} frame What asks for it; none if somebody else did.
   * @param {(reply: Reply) => void} stop
   */
  constructor(id, conversation, prompt, frame, stop) {
    super()
    this.id = id
    /** Undefined where the prompt was a list of messages. */
    this.conversation = conversation
    /** What was asked, where that is known. */
    this.prompt = prompt
    /** @internal */ this._frame = frame
    this.#stop = stop
    /** @type {Promise<Result>} Rejects with a {@link ReplyError}. */
    this.done = new Promise((resolve, reject) => { this.#settle = { resolve, reject } })
    this.done.catch(() => {}) // whoever wants to know asks
  }

  /** Stop it, at any time. Without a connection it ends here at once, and there later. */
  stop() {
    if (!this.ended) this.#stop(this)
    return this.done
  }

  /** @returns {AsyncGenerator<string, void, void>} */
  async *[Symbol.asyncIterator]() {
    const reader = { text: this.text, wake: () => {} }
    this.#readers.add(reader)
    try {
      while (reader.text || !this.ended) {
        const { text } = reader
        reader.text = ''
        if (text) yield text
        else await new Promise((resolve) => { reader.wake = () => resolve(undefined) })
      }
    } finally {
      this.#readers.delete(reader)
    }
    await this.done
  }

  /** @internal @param {Frame} frame @returns {boolean} Whether this was its last. */
  _receive(frame) {
    if (frame.type === 'start') {
      this.started = true
      this.conversation ??= frame.conversation
      this.prompt ??= frame.prompt
      this.model = frame.model
      this.queued = frame.queued
    } else if (frame.type === 'token' || frame.type === 'thinking') {
      if (this._starts || frame.seq <= this.seq) return false
      this.seq = frame.seq
      this.queued = undefined
      if (frame.type === 'thinking') this.thinking += frame.text
      else {
        this.text += frame.text
        for (const reader of this.#readers) reader.text += frame.text
      }
    } else {
      if (this._starts && frame.seq !== this.seq) return false // what is missing is on its way
      const { reason, by, usage, saved = true } = frame
      this._end(frame.type === 'done' ? { reason, by, usage, saved } : new ReplyError(frame))
      return true
    }
    this.#changed()
    return false
  }

  /** @internal @param {Result | ReplyError} how */
  _end(how) {
    if (this.ended) return
    this.ended = true
    if (how instanceof ReplyError) this.#settle?.reject(how)
    else this.#settle?.resolve(how)
    this.#changed()
  }

  #changed() {
    for (const reader of this.#readers) reader.wake()
    this.dispatchEvent(new Event('change'))
  }
}

/**
 * A connection that lasts. Its events, each with a `detail`:
 * - `state`: `{state, code, reason}`, the last two those of the close, if there was one.
 * - `reply`: a {@link Reply} that somebody else asked for in the conversation that is open.
 * - `history`: a {@link History}; also after each new connection, as more may have been said.
 * - `message`: every frame as it came, those of types that are not known here included.
 * - `error`: what went wrong and is about nothing that somebody waits for.
 */
export class Chat extends EventTarget {
  /** @type {State} */ state = 'connecting'
  /** @type {Map<string, Reply>} What has not ended, by id. */ replies = new Map()

  #url
  #options
  /** @type {Options['token']} */ #token
  #attempt = 0 // events of earlier ones mean nothing
  /** @type {WebSocket | undefined} */ #socket
  /** @type {string | undefined} What this socket said first. */ #greeting
  #authenticated = false
  #failures = 0 // in a row
  #heard = false // anything, since the last ping
  #missed = 0 // answers, in a row
  /** @type {ReturnType<typeof setTimeout> | undefined} Of the attempt, the pause or the ping. */ #timer
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #renewal
  /** @type {string | undefined} */ #followed
  /** @type {Set<string>} What ended here by a stop that the server has not confirmed. */ #stops = new Set()
  /** @type {Request[]} Without an answer so far, in order. */ #requests = []

  /** @param {string | URL} url @param {Options} options */
  constructor(url, options) {
    super()
    const { heartbeat = 15_000, firstPause = 500, longestPause = 15_000 } = options
    this.#url = new URL(url, globalThis.location?.href)
    this.#url.protocol = this.#url.protocol.replace('http', 'ws')
    this.#options = { ...options, heartbeat, firstPause, longestPause }
    this.#token = options.token
    /** The conversation that goes on where a prompt names none; set it to `newId()` for a new one. */
    this.conversation = options.conversation ?? newId()
    globalThis.addEventListener?.('online', this.#wake)
    globalThis.document?.addEventListener('visibilitychange', this.#wake)
    this.#connect()
  }

  /**
   * Ask for a reply.
   * @param {string | Message[]} prompt Messages stand for themselves: they touch no conversation.
   * @param {PromptOptions} [options]
   */
  prompt(prompt, options = {}) {
    const { id = newId(), onBusy, maxTokens, model, system, temperature } = options
    const known = this.replies.get(id)
    if (known) return known
    const text = typeof prompt === 'string' ? prompt.replace(/\p{Surrogate}/gu, '\ufffd') : undefined
    const conversation = text === undefined ? undefined : options.conversation ?? this.conversation
    const messages = typeof prompt === 'string' ? undefined : prompt.map(({ role, content }) => ({ role, content }))
    const reply = this.#add(id, conversation, text, {
      type: 'prompt', id, prompt: text, messages, conversation,
      on_busy: onBusy, max_tokens: maxTokens, model, system, temperature,
    })
    return this.#begin(reply)
  }

  /**
   * Go on with a reply that runs, or ended not long ago: one that another page had asked for.
   * @param {string} id
   * @param {{after?: number, conversation?: string}} [options] `after`: the `seq` of the last frame
   *   that is there already; the text is then what follows.
   */
  resume(id, { after = 0, conversation } = {}) {
    const known = this.replies.get(id)
    if (known) return known
    const reply = this.#add(id, conversation, undefined, undefined)
    reply.seq = after
    return this.#begin(reply)
  }

  /**
   * Get a conversation's history. Without `before`, also follow what runs in it now and later, and
   * have it be the one that goes on.
   * @param {string} conversation
   * @param {{before?: number}} [options] Get the part that ends here, and nothing else.
   * @returns {Promise<History>}
   */
  open(conversation, { before } = {}) {
    if (before === undefined) this.conversation = conversation
    return this.#request({ type: 'open', conversation, before })
  }

  /**
   * @param {{limit?: number, before?: string}} [options] `before`: the `next` of the last page.
   * @returns {Promise<{items: Item[], next?: string}>}
   */
  list({ limit, before } = {}) {
    return this.#request({ type: 'list', limit, before })
  }

  /** @param {string} conversation @param {string} title @returns {Promise<void>} */
  rename(conversation, title) {
    return this.#request({ type: 'rename', conversation, title })
  }

  /** @param {string} conversation @returns {Promise<void>} */
  delete(conversation) {
    return this.#request({ type: 'delete', conversation })
  }

  /** Say anew who the client is. @param {Options['token']} token */
  setToken(token) {
    this.#token = token
    if (this.state === 'unauthenticated') this.#connect()
    else if (this.state === 'open') this.#renew()
  }

  /** Leave for good. Replies go on at the server for a while; here they fail with `closed`. */
  close() {
    globalThis.removeEventListener?.('online', this.#wake)
    globalThis.document?.removeEventListener('visibilitychange', this.#wake)
    this.#leave(1000, '')
  }

  /**
   * `addEventListener`, with the detail itself.
   * @template {keyof Events} Type
   * @param {Type} type
   * @param {(detail: Events[Type]) => void} listener
   * @returns {() => void} Stop listening.
   */
  on(type, listener) {
    const hear = (/** @type {any} */ event) => listener(event.detail)
    this.addEventListener(type, hear)
    return () => this.removeEventListener(type, hear)
  }

  // The connection.

  async #connect() {
    const attempt = ++this.#attempt
    /** @template E @param {(event: E) => void} handle @returns {(event: E) => void} */
    const current = (handle) => (event) => { if (attempt === this.#attempt) handle(event) }
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#lost(1006, 'timeout'), CONNECT_TIMEOUT)
    this.#setState('connecting')
    try {
      const token = await (typeof this.#token === 'function' ? this.#token() : this.#token)
      if (attempt !== this.#attempt) return
      /** @type {WebSocket} */
      const socket = new (this.#options.WebSocket ?? globalThis.WebSocket)(this.#url.href, 'wsserver.v1')
      this.#socket = socket
      socket.onopen = current(() => this.#opened(token))
      socket.onmessage = current(({ data }) => this.#read(data))
      socket.onclose = current(({ code, reason }) => this.#lost(code, reason))
      socket.onerror = () => {} // a close follows
    } catch (error) {
      if (attempt === this.#attempt) this.#lost(1006, String(error))
    }
  }

  /** @param {string | undefined} token */
  #opened(token) {
    this.state = 'open'
    this.#greeting = token
    this.#authenticated = false
    if (token !== undefined) this.#send({ type: 'auth', token })
    for (const id of this.#stops) this.#send({ type: 'stop', id })
    for (const request of this.#requests) this.#sendRequest(request)
    const conversation = this.#followed
    if (conversation !== undefined && !this.#requests.some(({ frame }) => frame.type === 'open' && !frame.before)) {
      this.#request({ type: 'open', conversation }).catch((error) => {
        if (error.code === 'not_found') this.#forget(conversation) // deleted by others, meanwhile
        this.#tell('error', error)
      })
    }
    for (const reply of this.replies.values()) {
      reply._starts = 0
      reply._late = true
      this.#ask(reply)
    }
    this.#missed = 0
    this.#beat()
    this.#tell('state', { state: 'open' })
  }

  /** @param {number} code @param {string} reason */
  #lost(code, reason) {
    if (code === 1008 && reason === 'unauthenticated') return this.#turnedAway(reason)
    if (REFUSED_FOR_GOOD.includes(code)) return this.#leave(code, reason)
    this.#drop()
    if (code === 1009) this.#giveUpLongest()
    if ((code === 1000 || code === 1009) && !this.replies.size && !this.#requests.length) {
      return this.#setState('idle', code, reason)
    }
    this.#retry(code, reason)
  }

  /** @param {number} code @param {string} reason */
  #retry(code, reason) {
    const { firstPause, longestPause } = this.#options
    const pause = Math.random() * Math.min(longestPause, firstPause * 2 ** this.#failures++)
    this.#timer = setTimeout(() => this.#connect(), pause)
    this.#setState('waiting', code, reason)
  }

  /** Forget the socket, and whatever it still has to say. */
  #drop() {
    this.#attempt++
    clearTimeout(this.#timer)
    clearTimeout(this.#renewal)
    this.#socket?.close(1000)
    this.#socket = undefined
    this.state = 'waiting'
    for (const reply of this.replies.values()) if (reply._stopping) this.#stopHere(reply)
  }

  /** @param {number} code @param {string} reason */
  #leave(code, reason) {
    this.#drop()
    this.#setState('closed', code, reason)
    for (const reply of this.replies.values()) this.#finish(reply, closed(reason))
    for (const { reject } of this.#requests.splice(0)) reject(closed(reason))
  }

  /** Try with another token, if there is one. @param {string} reason */
  #turnedAway(reason) {
    const fresh = typeof this.#token === 'function' ? this.#authenticated : this.#token !== this.#greeting
    this.#drop()
    if (fresh) this.#retry(1008, reason)
    else this.#setState('unauthenticated', 1008, reason)
  }

  /** A message was too long for the server: which can only be the longest that it has not answered. */
  #giveUpLongest() {
    const error = new ReplyError({ code: 'too_long', message: 'This is too long for the server.' })
    const asked = [...this.replies.values()].filter((reply) => reply._sent && !reply.started)
    const [longest] = asked.sort((a, b) => size(b._frame) - size(a._frame))
    if (longest) this.#finish(longest, error)
    else this.#requests.shift()?.reject(error)
  }

  /** Someone looks, or the network is back: do not wait. */
  #wake = (/** @type {Event} */ { type }) => {
    if (type === 'visibilitychange' && document.visibilityState === 'hidden') return
    if (this.state === 'waiting' || (this.state === 'idle' && this.#followed)) this.#connect()
    else if (this.state === 'open') this.#beat(Math.min(WAKE_TIMEOUT, this.#options.heartbeat))
  }

  /**
   * A network that is gone closes nothing, so what answers no ping is given up. One missed answer
   * is enough only if the timer was on time: in a page that slept, answers wait behind timers.
   */
  #beat(pause = this.#options.heartbeat) {
    clearTimeout(this.#timer)
    const due = Date.now() + pause
    this.#heard = false
    this.#send({ type: 'ping' })
    this.#timer = setTimeout(() => {
      const late = Date.now() > due + pause / 2
      if (!this.#heard && (++this.#missed > 1 || !late)) this.#lost(1006, 'timeout')
      else this.#beat()
    }, pause)
  }

  /** Send a new token before the last one expires, or because there is another. */
  async #renew() {
    const attempt = this.#attempt
    try {
      const token = await (typeof this.#token === 'function' ? this.#token() : this.#token)
      if (attempt === this.#attempt && token !== undefined) this.#send({ type: 'auth', token })
    } catch (error) {
      this.#tell('error', error)
      if (attempt === this.#attempt) this.#renewal = setTimeout(() => this.#renew(), LEAST_RENEWAL)
    }
  }

  // What is sent.

  /** @param {Frame} frame */
  #send(frame) {
    // One that the server has begun to close is open until it has told so, but takes no more.
    if (this.state === 'open' && this.#socket?.readyState === OPEN) this.#socket.send(JSON.stringify(frame))
  }

  /** Connect again if there was nothing to do so far. @returns {boolean} Whether so. */
  #lazily() {
    if (this.state !== 'idle') return false
    this.#connect()
    return true
  }

  /** @param {Reply} reply */
  #begin(reply) {
    if (this.state === 'closed') this.#finish(reply, closed(''))
    else if (!this.#lazily()) this.#ask(reply)
    return reply
  }

  /** Send what has a reply come, or go on. @param {Reply} reply */
  #ask(reply) {
    if (this.state !== 'open') return
    reply._starts++
    reply._sent = true
    this.#send(demand(reply))
  }

  /** @param {Frame} frame @returns {Promise<any>} */
  #request(frame) {
    if (this.state === 'closed') return Promise.reject(closed(''))
    return new Promise((resolve, reject) => {
      const request = { frame, sent: 0, resolve, reject }
      this.#requests.push(request)
      if (!this.#lazily()) this.#sendRequest(request)
    })
  }

  /** @param {Request} request */
  #sendRequest(request) {
    if (this.state !== 'open') return
    request.sent++
    this.#send(request.frame)
  }

  // What arrives.

  /** Whoever says what nobody can read is no server of this protocol. @param {any} data */
  #read(data) {
    try {
      const frame = JSON.parse(data)
      if (!sound(frame)) throw new TypeError('not a frame')
      this.#receive(frame)
    } catch (error) {
      this.#leave(1002, `this is no server of this protocol: ${error}`)
    }
  }

  /** @param {Frame} frame */
  #receive(frame) {
    this.#heard = true
    this.#missed = 0
    if (frame.type !== 'error') this.#failures = 0
    this.#tell('message', frame)
    const { type, id, conversation } = frame
    if (type === 'start') this.#started(frame)
    else if (type === 'token' || type === 'thinking' || type === 'done') this.#piece(frame)
    else if (type === 'error') id === undefined ? this.#refused(frame) : this.#piece(frame)
    else if (type === 'history') this.#opens(frame)
    else if (type === 'conversations') this.#take('list')?.resolve({ items: frame.items, next: frame.next })
    else if (type === 'renamed') this.#take('rename', conversation)?.resolve(undefined)
    else if (type === 'deleted') this.#deleted(conversation)
    else if (type === 'authenticated') this.#welcomed(frame.expires)
  }

  /** @param {Frame} frame */
  #started(frame) {
    const { id, conversation, prompt } = frame
    let reply = this.replies.get(id)
    if (!reply) {
      if (prompt === undefined || conversation !== this.#followed || this.#stops.has(id)) return
      reply = this.#add(id, conversation, prompt, undefined)
      this.#tell('reply', reply)
    }
    // One that comes with its prompt is there because of `open`, and begins from the beginning: if
    // some is here already, or is on its way, only what is asked for counts.
    if (prompt === undefined) reply._starts = Math.max(0, reply._starts - 1)
    else if (reply.seq && !reply._starts) this.#ask(reply)
    reply._receive(frame)
  }

  /** @param {Frame} frame */
  #piece(frame) {
    const reply = this.replies.get(frame.id)
    if (reply?._receive(frame)) this.replies.delete(frame.id)
    if (frame.type === 'done' || frame.type === 'error') this.#stops.delete(frame.id)
  }

  /** @param {Frame} frame */
  #refused(frame) {
    const { code, about, retryable, retry_after: seconds } = frame
    const reply = this.replies.get(about)
    if (code === 'unauthenticated') this.#turnedAway(code)
    else if (code === 'not_running') this.#stops.delete(about)
    else if (!reply) this.#failed(frame)
    else if (code === 'shutting_down') return // asked for again over the next connection
    else if (reply.started && code === 'gap') this.#send({ type: 'resume', id: about }) // it has less than we
    else if (reply.started && retryable) this.#again(reply, seconds)
    else if (reply._late && code === 'limit' && seconds !== undefined) this.#again(reply, seconds)
    else this.#finish(reply, new ReplyError(frame))
  }

  /** Ask once more for what nobody has asked for just now. @param {Reply} reply @param {number} [seconds] */
  #again(reply, seconds = RETRY) {
    const attempt = this.#attempt
    setTimeout(() => {
      if (attempt === this.#attempt && !reply.ended) this.#send(demand(reply))
    }, seconds * 1000)
  }

  /** An error that is about no reply. @param {Frame} frame */
  #failed(frame) {
    if (this.#greeting !== undefined && !this.#authenticated && frame.about === undefined) return // a close follows
    const found = this.#requests.find((request) => request.frame.conversation === frame.about)
    if (!found) return this.#tell('error', new ReplyError(frame))
    if (frame.code === 'shutting_down') return
    this.#requests.splice(this.#requests.indexOf(found), 1)
    if (found.sent > 1 && found.frame.type === 'delete' && frame.code === 'not_found') found.resolve(undefined)
    else found.reject(new ReplyError(frame))
  }

  /** @param {Frame} frame */
  #opens({ conversation, title, messages, running, before }) {
    const request = this.#take('open', conversation)
    /** @type {History} */
    const history = { conversation, title, messages, replies: [], before }
    if (request && request.frame.before === undefined) {
      this.#followed = conversation
      history.replies = running
        .filter((/** @type {string} */ id) => !this.#stops.has(id))
        .map((/** @type {string} */ id) => this.replies.get(id) ?? this.#add(id, conversation, undefined, undefined))
      this.#tell('history', history)
    }
    request?.resolve(history)
  }

  /** @param {string} conversation */
  #deleted(conversation) {
    this.#forget(conversation)
    const asked = this.#take('delete', conversation)
    if (asked) asked.resolve(undefined)
    else this.#tell('deleted', { conversation })
  }

  /** @param {string} conversation */
  #forget(conversation) {
    if (this.#followed === conversation) this.#followed = undefined
    if (this.conversation === conversation) this.conversation = newId()
  }

  /** @param {number | undefined} expires */
  #welcomed(expires) {
    this.#authenticated = true
    clearTimeout(this.#renewal)
    if (expires === undefined || typeof this.#token !== 'function') return
    const left = expires * 1000 - Date.now()
    const pause = Math.max(LEAST_RENEWAL, left - RENEW_BEFORE, left / 2)
    this.#renewal = setTimeout(() => this.#renew(), Math.min(pause, LONGEST_TIMER))
  }

  /** Find what is answered: answers come in order. @param {string} type @param {string} [conversation] */
  #take(type, conversation) {
    const fits = (/** @type {Request} */ { frame }) => frame.type === type && frame.conversation === conversation
    const place = this.#requests.findIndex(fits)
    return place < 0 ? undefined : this.#requests.splice(place, 1)[0]
  }

  // Replies.

  /** @param {string} id @param {string | undefined} conversation @param {string | undefined} prompt @param {Frame | undefined} frame */
  #add(id, conversation, prompt, frame) {
    const reply = new Reply(id, conversation, prompt, frame, (reply) => this.#stop(reply))
    this.replies.set(id, reply)
    return reply
  }

  /** @param {Reply} reply */
  #stop(reply) {
    reply._stopping = true
    if (this.state === 'open') this.#send({ type: 'stop', id: reply.id })
    else this.#stopHere(reply)
  }

  /** @param {Reply} reply */
  #stopHere(reply) {
    if (reply._sent || !reply._frame) this.#stops.add(reply.id)
    this.#finish(reply, { reason: 'stopped', by: 'client' })
  }

  /** @param {Reply} reply @param {Result | ReplyError} how */
  #finish(reply, how) {
    this.replies.delete(reply.id)
    reply._end(how)
  }

  // What is told.

  /** @param {State} state @param {number} [code] @param {string} [reason] */
  #setState(state, code, reason) {
    this.state = state
    this.#tell('state', { state, code, reason })
  }

  /** @template {keyof Events} Type @param {Type} type @param {Events[Type]} detail */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }
}

/** A random id, for a reply or a conversation. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('')
}

/**
 * Connect to a server, and stay connected.
 * @param {string | URL} [url] Default: the server that the page came from.
 * @param {Options} [options]
 */
export function connect(url = '/ws', options = {}) {
  return new Chat(url, options)
}

/** Whether a message has what is relied on. @param {any} frame */
function sound(frame) {
  if (typeof frame !== 'object' || frame === null || Array.isArray(frame)) return false
  const { type, seq, text, messages, running, items } = frame
  if (type === 'token' || type === 'thinking') return Number.isSafeInteger(seq) && typeof text === 'string'
  if (type === 'history') return Array.isArray(messages) && Array.isArray(running)
  return type !== 'conversations' || Array.isArray(items)
}

/** @param {string} reason */
const closed = (reason) => new ReplyError({ code: 'closed', message: `The connection was closed${reason && `: ${reason}`}.` })

/** What has a reply come, or go on. @param {Reply} reply @returns {Frame} */
const demand = ({ id, seq, started, _frame }) => (started ? undefined : _frame) ?? { type: 'resume', id, after: seq }

/** @param {Frame | undefined} frame */
const size = (frame) => JSON.stringify(frame ?? '').length
