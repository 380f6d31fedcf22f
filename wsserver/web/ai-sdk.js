/**
 * A transport for `useChat` of the AI SDK (version 7) over a WebSocket of wsserver. Copy it together with client.js.
 *
 * ```jsx
 * import { useChat } from '@ai-sdk/react'
 * import { ChatTransport } from './ai-sdk.js'
 * const transport = new ChatTransport('wss://chat.example.com/ws') // outside of the component, for all chats
 * const { messages, sendMessage, stop } = useChat({ id, messages: await transport.history(id), transport, resume: true })
 * ```
 *
 * A lost connection is invisible: the client reconnects and the reply goes on where it was. A page that loads again
 * goes on with the reply that runs, because of `resume: true`. `stop()` sends `stop`, and the server closes the request
 * to the model. `useChat` also stops its reply when its component goes away; a `Chat` that was made outside of the
 * component, for `useChat({ chat })`, does not.
 */

import { connect, ReplyError } from './client.js'

/**
 * @typedef {import('ai').UIMessage} UIMessage
 * @typedef {import('ai').UIMessageChunk} Chunk
 * @typedef {import('ai').ChatTransport<UIMessage>} Transport
 * @internal @typedef {Record<string, any> & {type: string}} Block A block of any type, with the values that the server sends.
 * @typedef {import('./client.js').Reply} Reply
 * @typedef {{model?: string, system?: string, max_tokens?: number, temperature?: number}} Body Settings of a prompt.
 * @typedef {import('./client.js').Options & {body?: Body | (() => Body)}} Options `body`: for prompts that say nothing else.
 * @typedef {{id: string, role: 'user' | 'assistant', content: Block[]}} Message
 */

const ID = /^[\w-]{16,64}$/
const DATA_URL = /^data:([^;,]*);base64,(.*)$/s
const FINISH_REASONS = /** @type {Record<string, any>} */ ({
  __proto__: null, // a reason may be any word, such as `constructor`
  end_turn: 'stop', stop_sequence: 'stop', max_tokens: 'length', model_context_window_exceeded: 'length',
  tool_use: 'tool-calls', refusal: 'content-filter',
})

/** @implements {Transport} */
export class ChatTransport {
  /** `reconnectToStream` returns a reply from its beginning. */
  resumeStreamIsReplay = true

  #url
  #options
  #body
  /** @type {import('./client.js').Chat | undefined} */ #chat
  /** @type {WeakSet<import('./client.js').Chat>} Clients whose token the server did not accept. */ #denied = new WeakSet()
  /** @type {Map<string, string>} The last reply that began here, by conversation. */ #last = new Map()
  /** @type {Map<string, UIMessage>} The prompts of replies that run, by reply. */ #prompts = new Map()
  /** @type {Map<string, Reply>} Replies whose prompts `history` has returned, by chat. */ #expected = new Map()
  /** @type {Set<string>} Chats that this turn of the event loop reconnects. */ #reconnecting = new Set()

  /** @param {string | URL} [url] Default: the server that the page came from. @param {Options} [options] */
  constructor(url = '/ws', { body = {}, ...options } = {}) {
    this.#url = url
    this.#options = options
    this.#body = body
  }

  /** The client of client.js, which connects when it is needed first. All chats share it. */
  get chat() {
    if (this.#chat) return this.#chat
    const chat = this.#chat = connect(this.#url, this.#options)
    chat.on('state', ({ state }) => {
      if (state !== 'unauthenticated') return
      this.#denied.add(chat)
      if (chat === this.#chat) this.close() // prompts fail, and do not wait for another token
    })
    return chat
  }

  /** Close the connection. The next prompt connects again. */
  close() {
    const chat = this.#chat
    this.#chat = undefined
    chat?.close()
  }

  /** @type {Transport['sendMessages']} */
  async sendMessages({ chatId, trigger, messageId, messages, abortSignal, body }) {
    const given = typeof this.#body === 'function' ? this.#body() : this.#body
    const { model, max_tokens: maxTokens, temperature, system } = /** @type {Body} */ ({ ...given, ...body })
    const conversation = await conversationOf(chatId)
    const replaces = trigger === 'regenerate-message' || messageId !== undefined
    const place = await unlessAborted(this.#place(conversation, toMessages(messages), replaces), abortSignal)
    const reply = this.chat.prompt(place.prompt, {
      conversation, onBusy: 'interrupt', retryOf: place.retryOf, model, system: systemOf(messages) ?? system, maxTokens, temperature,
    })
    const remember = () => { if (reply.started && reply.conversation) this.#last.set(conversation, reply.id) }
    reply.addEventListener('change', remember, { once: true })
    this.#prompts.set(reply.id, messages[messages.length - 1])
    if (!reply.conversation) unstored.set(chatId, reply.id)
    return this.#stream(reply, chatId, abortSignal)
  }

  /** @type {Transport['reconnectToStream']} */
  async reconnectToStream({ chatId, abortSignal }) {
    this.#reconnecting.add(chatId)
    queueMicrotask(() => this.#reconnecting.delete(chatId))
    const reply = await unlessAborted(this.#running(chatId), abortSignal)
    this.#expected.delete(chatId)
    return reply ? this.#stream(reply, chatId, abortSignal) : null
  }

  /**
   * Get the messages of a chat, for the `messages` of `useChat`. The last one is the prompt of the reply that runs.
   * @param {string} chatId
   * @returns {Promise<UIMessage[]>} The newest messages, as many as the server sends at once. Empty for a new chat.
   */
  async history(chatId) {
    const { messages, replies: [reply] } = await this.#open(await conversationOf(chatId))
    if (!reply || !await hasBegun(reply)) return messages.map(toUIMessage)
    this.#expected.set(chatId, reply) // the reply may end before `useChat` asks for it
    const prompt = this.#prompts.get(reply.id) ?? toUIMessage({ id: reply.id, role: 'user', content: reply.prompt ?? '' })
    return [...messages.filter(({ id }) => !reply.retryOf || id !== reply.retryOf).map(toUIMessage), prompt]
  }

  /** Find the reply that runs in a chat. @param {string} chatId @returns {Promise<Reply | undefined>} */
  async #running(chatId) {
    const conversation = await conversationOf(chatId), id = unstored.get(chatId)
    if (this.#expected.has(chatId)) return this.#expected.get(chatId)
    const kept = id ? this.chat.resume(id) : undefined
    return kept && await hasBegun(kept) ? kept : (await this.#open(conversation)).replies[0]
  }

  /** Follow a conversation. @param {string} conversation @returns {Promise<{messages: import('./client.js').Message[], replies: Reply[]}>} */
  async #open(conversation) {
    const chat = this.chat
    try {
      return await chat.open(conversation)
    } catch (error) {
      if (/** @type {any} */ (error).code === 'not_found') return { messages: [], replies: [] }
      throw this.#explained(chat, error)
    }
  }

  /** The error of a call or a reply. @param {import('./client.js').Chat} chat @param {any} error */
  #explained(chat, error) {
    if (error.code !== 'closed' || !this.#denied.has(chat)) return error
    return new ReplyError({ code: 'unauthenticated', message: 'The server does not accept the token.' })
  }

  /**
   * Find the place of the newest message in the server's history. The server has the history of a chat, and needs only
   * the newest message, but for a chat that it does not know, or whose older messages were changed here.
   * @param {string} conversation
   * @param {Message[]} messages
   * @param {boolean} replaces Whether the message replaces one that was sent before.
   * @returns {Promise<{prompt: Block[] | Message[], retryOf?: string}>}
   */
  async #place(conversation, messages, replaces) {
    const newest = messages.at(-1)
    if (newest?.role !== 'user') throw new TypeError('The last message must be of the user.')
    const prompt = newest.content
    const previous = messages.findLast(({ role }) => role === 'assistant')?.id
    if (!replaces && (previous === undefined || previous === this.#last.get(conversation))) return { prompt }
    const history = await this.#open(conversation)
    const turns = [...new Set([...history.messages, ...history.replies].map(({ id }) => /** @type {string} */ (id)))]
    const before = previous === undefined ? 0 : turns.indexOf(previous) + 1 // turns before the message
    if (previous !== undefined && !before) return { prompt: messages }
    if (!replaces || before === turns.length) return { prompt }
    return before === turns.length - 1 ? { prompt, retryOf: turns.at(-1) } : { prompt: messages }
  }

  /** @param {Reply} reply @param {string} chatId @param {AbortSignal} [signal] @returns {ReadableStream<Chunk>} */
  #stream(reply, chatId, signal) {
    // `resumeStream` of `useChat` aborts the stream that it had, and reconnects at once: that is no stop.
    const stop = () => queueMicrotask(() => { if (!this.#reconnecting.has(chatId)) reply.stop() })
    signal?.addEventListener('abort', stop, { once: true })
    reply.done.catch(() => {}).finally(() => {
      this.#prompts.delete(reply.id)
      if (unstored.get(chatId) === reply.id) unstored.set(chatId)
    })
    const chunks = chunksOf(reply), chat = this.chat
    return new ReadableStream({
      pull: async (controller) => {
        const { done, value } = await chunks.next().catch((error) => { throw this.#explained(chat, error) })
        if (done) controller.close()
        else controller.enqueue(value)
      },
    }, { highWaterMark: 0 }) // chunks are made when they are read, so that an error overtakes none
  }
}

/** The running replies that belong to no conversation, by chat, for the next load of the page. */
const unstored = {
  /** @param {string} chatId */
  get(chatId) {
    try {
      return sessionStorage.getItem(`wsserver.${chatId}`)
    } catch {
      return null // the page may store nothing
    }
  },
  /** @param {string} chatId @param {string} [id] */
  set(chatId, id) {
    try {
      if (id) sessionStorage.setItem(`wsserver.${chatId}`, id)
      else sessionStorage.removeItem(`wsserver.${chatId}`)
    } catch {} // as above
  },
}

/** Wait for the next change of a reply. @param {Reply} reply @returns {Promise<unknown>} */
const changeOf = (reply) => new Promise((resolve) => reply.addEventListener('change', resolve, { once: true }))

/** Wait until a reply has begun or failed. @param {Reply} reply @returns {Promise<boolean>} Whether it has begun. */
async function hasBegun(reply) {
  while (!reply.started && !reply.ended) await changeOf(reply)
  return reply.started
}

/** Wait for a promise, but fail when a signal aborts. @template T @param {Promise<T>} promise @param {AbortSignal} [signal] @returns {Promise<T>} */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal?.reason)
    if (signal?.aborted) abort()
    signal?.addEventListener('abort', abort, { once: true })
    promise.then(resolve, reject)
  })
}

/**
 * Yield a reply from its beginning, and throw its error.
 * @param {Reply} reply
 * @returns {AsyncGenerator<Chunk, void, void>}
 */
async function* chunksOf(reply) {
  if (await hasBegun(reply)) {
    const { id, conversation, model } = reply
    yield { type: 'start', messageId: id, messageMetadata: { conversation, model } }
    yield { type: 'start-step' }
  }
  let parts = new Parts(), seq = 0
  for (;;) {
    const change = changeOf(reply)
    if (reply.seq < seq) { // the server crashed, and has less than it had sent
      parts = new Parts()
      yield { type: 'reset-step' }
    }
    seq = reply.seq
    yield* parts.add(reply.blocks)
    if (reply.ended && reply.seq === seq) break
    await change
  }
  yield* parts.end()
  const result = await reply.done.catch((error) => /** @type {import('./client.js').ReplyError} */ (error))
  if (result instanceof Error) {
    const { code, ref, usage } = result
    if (reply.started) yield { type: 'message-metadata', messageMetadata: { code, ref, usage } }
    throw result
  }
  const { reason, by, usage } = result
  if (reason === 'stopped') {
    yield { type: 'message-metadata', messageMetadata: { reason, by, usage } }
    yield { type: 'abort', reason: by }
    return
  }
  yield { type: 'finish-step' }
  yield { type: 'finish', finishReason: FINISH_REASONS[reason] ?? 'other', messageMetadata: { reason, usage } }
}

/** What of a reply was written, as parts of a message. */
class Parts {
  /** @type {{name: 'text' | 'reasoning' | undefined, length: number}[]} By block. */ #written = []
  /** @type {Set<string>} */ #sources = new Set(); // without the semicolon, the next star would multiply

  /** Write what is new. @param {Block[]} blocks @returns {Generator<Chunk, void, void>} */
  *add(blocks) {
    for (let index = Math.max(0, this.#written.length - 1); index < blocks.length; index++) {
      const { type, text = '', thinking = '', citations = [] } = blocks[index]
      const name = type === 'text' ? 'text' : type === 'thinking' ? 'reasoning' : undefined
      const id = String(index), whole = text + thinking
      if (index === this.#written.length) {
        yield* this.end()
        this.#written.push({ name, length: 0 })
        if (name) yield { type: `${name}-start`, id }
      }
      const part = this.#written[index], delta = whole.slice(part.length)
      part.length = whole.length
      if (name && delta) yield { type: `${name}-delta`, id, delta }
      for (const source of toSources(citations)) {
        if (this.#sources.has(source.sourceId)) continue
        this.#sources.add(source.sourceId)
        yield source
      }
    }
  }

  /** End the part that is open. @returns {Generator<Chunk, void, void>} */
  *end() {
    const part = this.#written.at(-1)
    if (part?.name) yield { type: `${part.name}-end`, id: String(this.#written.length - 1) }
  }
}

/**
 * The sources of citations of the Messages API.
 * @param {any[]} citations
 * @returns {(import('ai').SourceUrlUIPart | import('ai').SourceDocumentUIPart)[]}
 */
function toSources(citations) {
  return citations.map(({ type, url, title, document_index: index = 0, document_title: document }) => {
    if (url) return { type: 'source-url', sourceId: url, url, ...(title && { title }) }
    const mediaType = type === 'page_location' ? 'application/pdf' : 'text/plain'
    return { type: 'source-document', sourceId: `document-${index}`, mediaType, title: document || title || `Document ${index + 1}` }
  })
}

/** The conversation of a chat, as for clients over HTTP. @param {string} chatId @returns {Promise<string>} */
async function conversationOf(chatId) {
  if (ID.test(chatId)) return chatId
  if (!globalThis.crypto?.subtle) throw new TypeError('Without https, the id of a chat must be 16 to 64 of A-Z, a-z, 0-9, _ and -.')
  const digest = await crypto.subtle.digest('SHA-256', new TextEncoder().encode(chatId))
  return 'chat-' + toBase64(new Uint8Array(digest)).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '')
}

/** @param {Uint8Array} bytes */
const toBase64 = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(''))

/** @param {UIMessage[]} messages @returns {string | undefined} */
function systemOf(messages) {
  const texts = messages.filter(({ role }) => role === 'system').flatMap(toBlocks).map(({ text }) => text)
  return texts.join('\n\n') || undefined
}

/** The messages that have content for the model. @param {UIMessage[]} messages @returns {Message[]} */
function toMessages(messages) {
  return messages.flatMap((message) => {
    const { id, role } = message, content = toBlocks(message)
    return role === 'system' || !content.length ? [] : [{ id, role, content }]
  })
}

/** The content blocks of the texts and files of a message. @param {UIMessage} message @returns {Block[]} */
function toBlocks({ parts }) {
  return parts.flatMap(/** @returns {Block[]} */ (part) => {
    if (part.type === 'text') return part.text.trim() ? [{ type: 'text', text: part.text }] : []
    if (part.type !== 'file') return []
    const { mediaType, url, filename: title } = part, [, , data] = DATA_URL.exec(url) ?? []
    const source = data === undefined ? { type: 'url', url } : { type: 'base64', media_type: mediaType, data }
    if (mediaType.startsWith('image/')) return [{ type: 'image', source }]
    if (data === undefined || !mediaType.startsWith('text/')) return [{ type: 'document', source, title }]
    const text = new TextDecoder().decode(Uint8Array.from(atob(data), (character) => character.charCodeAt(0)))
    return [{ type: 'document', source: { type: 'text', media_type: 'text/plain', data: text }, title }]
  })
}

/**
 * @param {import('./client.js').Message} message
 * @returns {UIMessage} The message of a reply has the id of the reply.
 */
function toUIMessage({ id = '', role, content, blocks = [{ type: 'text', text: content }], model, usage, partial }) {
  if (role === 'user') return { id: `${id}-prompt`, role, parts: blocks.flatMap(toParts) }
  return { id, role, parts: blocks.flatMap(toParts), metadata: { model, usage, partial } }
}

/** @param {Block} block @returns {UIMessage['parts']} */
function toParts({ type, text, thinking, source, title, citations = [] }) {
  if (type === 'text') return [{ type, text, state: 'done' }, ...toSources(citations)]
  if (type === 'thinking') return [{ type: 'reasoning', text: thinking, state: 'done' }]
  if ((type !== 'image' && type !== 'document') || !source) return []
  const { media_type: mediaType = type === 'image' ? 'image/*' : 'application/pdf', data, url } = source
  if (url === undefined && data === undefined) return [] // a file of the API
  const base64 = source.type === 'text' ? toBase64(new TextEncoder().encode(data)) : data
  return [{ type: 'file', mediaType, url: url ?? `data:${mediaType};base64,${base64}`, filename: title }]
}
