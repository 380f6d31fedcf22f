/**
 * A React hook for one conversation of wsserver, on top of client.js. For React 18 or later.
 *
 * ```jsx
 * import { useChat } from './react.js'
 * const { messages, status, send, stop } = useChat({ url: 'wss://chat.example.com/ws' })
 * ```
 */

import { useCallback, useEffect, useRef, useState } from 'react'
import { connect, newId } from './client.js'

/**
 * @typedef {import('./client.js').Chat} Chat
 * @typedef {import('./client.js').Reply} Reply
 * @typedef {import('./client.js').ReplyError} ReplyError
 * @typedef {import('./client.js').Message & {id: string}} ChatMessage Both messages of a turn have its id.
 * @typedef {'submitted' | 'streaming' | 'ready' | 'error'} Status Of the newest reply.
 *
 * @typedef {object} View The conversation that the component shows.
 * @property {string} url
 * @property {string | undefined} option The option `conversation`.
 * @property {string} conversation
 * @property {ChatMessage[]} messages
 * @property {Status} status
 * @property {ReplyError} [error]
 * @property {Reply} [newest]
 *
 * @typedef {object} Conversation What `useChat` returns.
 * @property {string} conversation The id of the conversation.
 * @property {ChatMessage[]} messages Oldest first, with the reply that runs.
 * @property {Status} status
 * @property {(text: string) => void} send Send a prompt. It interrupts a running reply.
 * @property {() => void} retry Repeat the last prompt; the new turn replaces the old one.
 * @property {() => void} stop Stop the running replies.
 * @property {ReplyError | undefined} error Why the newest reply or the history failed.
 * @property {Chat['state']} connection The state of the connection.
 */

/**
 * A React hook for one conversation.
 *
 * It returns `conversation`, the id of the conversation that it shows. Save the id once there are messages, for
 * example in the address of the page. After a reload, pass it as the option to get the messages back. Passing it
 * while the hook shows the conversation changes nothing.
 * @param {object} options
 * @param {string} options.url
 * @param {string | (() => string | Promise<string>)} [options.token]
 * @param {string} [options.conversation] An existing conversation: the hook loads its messages, and shows the
 *   prompts of other pages too. Default: a new one. Another value switches to another conversation. The replies
 *   of the previous conversation continue.
 * @returns {Conversation}
 */
export function useChat({ url, token, conversation: option }) {
  const [shown, setView] = useState(() => newView(url, option))
  const [connection, setConnection] = useState(/** @type {Chat['state']} */ ('connecting'))
  const chat = useRef(/** @type {Chat | undefined} */ (undefined))
  const followed = useRef(/** @type {WeakSet<Reply>} */ (new WeakSet()))
  const tokens = useRef(token)
  const fixed = typeof token === 'function' ? fresh : token

  let view = shown
  if (view.url !== url || view.option !== option) { // switch before React renders
    view = view.url === url && view.conversation === option ? { ...view, option } : newView(url, option)
    setView(view)
  }
  const { conversation, messages, status, error, newest } = view

  function fresh() {
    return typeof tokens.current === 'function' ? tokens.current() : tokens.current ?? ''
  }

  const follow = useCallback((/** @type {Reply} */ reply) => {
    const from = chat.current
    /** Update the view, if it shows the conversation of this reply. */
    const change = (/** @type {(view: View) => Partial<View>} */ change) => {
      if (chat.current === from) setView((view) => (view.conversation === reply.conversation ? { ...view, ...change(view) } : view))
    }
    const update = () => change(({ messages, status, newest }) => {
      const now = reply.text || reply.thinking ? 'streaming' : 'submitted'
      return { messages: withReply(messages, reply), status: newest === reply && !reply.ended ? now : status }
    })
    const end = (/** @type {string | undefined} */ partial, /** @type {ReplyError | undefined} */ error) => change(({ messages, newest }) => ({
      messages: withReply(messages, reply, partial),
      ...(newest === reply && { status: error ? 'error' : 'ready', error }),
    }))
    change(() => ({ newest: reply, error: undefined }))
    update()
    if (followed.current.has(reply)) return
    followed.current.add(reply)
    reply.addEventListener('change', update)
    reply.done.then(({ by }) => end(by, undefined), (error) => end(error.code, error))
  }, [])

  useEffect(() => {
    const current = connect(url, { token: fixed })
    chat.current = current
    setConnection(current.state)
    current.on('state', ({ state }) => { if (chat.current === current) setConnection(state) })
    current.on('reply', follow)
    current.on('history', ({ conversation, messages, replies }) => {
      const saved = messages.map((message) => ({ ...message, id: message.id ?? '' }))
      setView((view) => (view.conversation === conversation ? { ...view, messages: saved } : view))
      for (const reply of replies) follow(reply)
    })
    return () => {
      chat.current = undefined
      current.close()
    }
  }, [url, follow])

  useEffect(() => {
    if (option !== conversation) return // a new conversation has no history
    chat.current?.open(conversation).catch((error) => {
      if (error.code !== 'closed') setView((view) => (view.conversation === conversation ? { ...view, error } : view))
    })
  }, [url, conversation])

  useEffect(() => {
    tokens.current = token
    if (typeof token !== 'function') chat.current?.setToken(token)
  }, [token])

  const ask = useCallback((/** @type {string} */ text, /** @type {string | undefined} */ retryOf) => {
    if (chat.current) follow(chat.current.prompt(text, { conversation, retryOf, onBusy: 'interrupt' }))
  }, [conversation, follow])

  const send = useCallback((/** @type {string} */ text) => ask(text, undefined), [ask])

  const retry = useCallback(() => {
    const last = messages.findLast(({ role }) => role === 'user')
    if (!last) return
    const refused = newest?.id === last.id && newest.ended && !newest.started // the server has no such turn
    if (refused) setView((view) => ({ ...view, messages: view.messages.filter(({ id }) => id !== last.id) }))
    ask(last.content, refused ? newest.retryOf : last.id)
  }, [ask, messages, newest])

  const stop = useCallback(() => {
    for (const reply of chat.current?.replies.values() ?? []) if (reply.conversation === conversation) reply.stop()
  }, [conversation])

  return { conversation, messages, status, send, retry, stop, error, connection }
}

/** @param {string} url @param {string | undefined} option @returns {View} */
function newView(url, option) {
  return { url, option, conversation: option ?? newId(), messages: [], status: 'ready' }
}

/**
 * Insert or update the messages of a reply, and remove the turn that a started reply replaces.
 * @param {ChatMessage[]} messages
 * @param {Reply} reply
 * @param {string} [partial]
 * @returns {ChatMessage[]}
 */
function withReply(messages, { id, prompt = '', text, thinking, model, started, retryOf }, partial) {
  /** @type {ChatMessage[]} */
  const turn = [
    { id, role: 'user', content: prompt },
    { id, role: 'assistant', content: text, thinking, partial, model },
  ]
  const others = started && retryOf ? messages.filter((message) => message.id !== retryOf) : messages
  const place = others.findIndex((message) => message.id === id)
  if (place < 0) return [...others, ...turn]
  return [...others.slice(0, place), ...turn, ...others.slice(place + 1).filter((message) => message.id !== id)]
}
