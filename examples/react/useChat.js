import { useCallback, useEffect, useRef, useState } from 'react'
import { connect, newId } from '../../wsserver/web/client.js' // in a project of your own, a copy of it

/**
 * @typedef {import('../../wsserver/web/client.js').Chat} Chat
 * @typedef {import('../../wsserver/web/client.js').Reply} Reply
 * @typedef {{id: string, role: 'user' | 'assistant', content: string, thinking?: string, partial?: string}} ChatMessage
 *   Both messages of a turn have its id.
 * @typedef {'submitted' | 'streaming' | 'ready' | 'error'} Status Of the newest reply.
 *
 * @typedef {object} View What is on show: one conversation.
 * @property {string} url
 * @property {string | undefined} given The option `conversation`.
 * @property {string} conversation
 * @property {ChatMessage[]} messages
 * @property {Status} status
 * @property {Error} [error]
 * @property {Reply} [newest]
 */

/**
 * A chat in a component.
 *
 * `conversation` in what it returns is the id of the conversation on show. Keep the id once there are
 * messages, in the address of the page for example: given as the option it brings them back after a
 * reload. To give it while the conversation is on show changes nothing.
 * @param {object} options
 * @param {string} options.url
 * @param {string | (() => string | Promise<string>)} [options.token]
 * @param {string} [options.conversation] One that exists: its messages are loaded, and what any
 *   other page asks in it is shown as well. Without it a new one begins. Another value switches;
 *   replies in the conversation before go on.
 */
export function useChat({ url, token, conversation: given }) {
  const [shown, setView] = useState(() => begin(url, given))
  const [connection, setConnection] = useState(/** @type {Chat['state']} */ ('connecting'))
  const chat = useRef(/** @type {Chat | undefined} */ (undefined))
  const heard = useRef(/** @type {WeakSet<Reply>} */ (new WeakSet()))
  const tokens = useRef(token)
  const fixed = typeof token === 'function' ? fresh : token

  let view = shown
  if (view.url !== url || view.given !== given) { // switch before anything is drawn
    view = view.url === url && view.conversation === given ? { ...view, given } : begin(url, given)
    setView(view)
  }
  const { conversation, messages, status, error, newest } = view

  function fresh() {
    return typeof tokens.current === 'function' ? tokens.current() : tokens.current ?? ''
  }

  const show = useCallback((/** @type {Reply} */ reply) => {
    const from = chat.current
    /** Change what is on show, if it is the conversation of this reply. */
    const change = (/** @type {(view: View) => Partial<View>} */ change) => {
      if (chat.current === from) setView((view) => (view.conversation === reply.conversation ? { ...view, ...change(view) } : view))
    }
    const update = () => change(({ messages, status, newest }) => {
      const now = reply.text || reply.thinking ? 'streaming' : 'submitted'
      return { messages: placed(messages, reply), status: newest === reply && !reply.ended ? now : status }
    })
    const end = (/** @type {string | undefined} */ partial, /** @type {Error | undefined} */ error) => change(({ messages, newest }) => ({
      messages: placed(messages, reply, partial),
      ...(newest === reply && { status: error ? 'error' : 'ready', error }),
    }))
    change(() => ({ newest: reply, error: undefined }))
    update()
    if (heard.current.has(reply)) return
    heard.current.add(reply)
    reply.addEventListener('change', update)
    reply.done.then(({ by }) => end(by, undefined), (error) => end(error.code, error))
  }, [])

  useEffect(() => {
    const current = connect(url, { token: fixed })
    chat.current = current
    setConnection(current.state)
    current.on('state', ({ state }) => { if (chat.current === current) setConnection(state) })
    current.on('reply', show)
    current.on('history', ({ conversation, messages, replies }) => {
      const told = messages.map(({ id = '', role, content, partial }) => ({ id, role, content, partial }))
      setView((view) => (view.conversation === conversation ? { ...view, messages: told } : view))
      for (const reply of replies) show(reply)
    })
    return () => {
      chat.current = undefined
      current.close()
    }
  }, [url, show])

  useEffect(() => {
    if (given !== conversation) return // it begins here
    chat.current?.open(conversation).catch((error) => {
      if (error.code !== 'closed') setView((view) => (view.conversation === conversation ? { ...view, error } : view))
    })
  }, [url, conversation])

  useEffect(() => {
    tokens.current = token
    if (typeof token !== 'function') chat.current?.setToken(token)
  }, [token])

  const ask = useCallback((/** @type {string} */ text, /** @type {string | undefined} */ retryOf) => {
    if (chat.current) show(chat.current.prompt(text, { conversation, retryOf, onBusy: 'interrupt' }))
  }, [conversation, show])

  /** Ask; a reply that still runs is interrupted. */
  const send = useCallback((/** @type {string} */ text) => ask(text, undefined), [ask])

  /** Ask the last prompt again, in place of its reply. */
  const retry = useCallback(() => {
    const last = messages.findLast(({ role }) => role === 'user')
    if (!last) return
    const refused = newest?.id === last.id && newest.ended && !newest.started // the server knows nothing of it
    if (refused) setView((view) => ({ ...view, messages: view.messages.filter(({ id }) => id !== last.id) }))
    ask(last.content, refused ? newest.retryOf : last.id)
  }, [ask, messages, newest])

  /** Stop what runs. */
  const stop = useCallback(() => {
    for (const reply of chat.current?.replies.values() ?? []) if (reply.conversation === conversation) reply.stop()
  }, [conversation])

  return { conversation, messages, status, send, retry, stop, error, connection }
}

/** @param {string} url @param {string | undefined} given @returns {View} */
function begin(url, given) {
  return { url, given, conversation: given ?? newId(), messages: [], status: 'ready' }
}

/**
 * Put a reply where it is already, or at the end; the turn that it replaces goes once it has started.
 * @param {ChatMessage[]} messages
 * @param {Reply} reply
 * @param {string} [partial]
 * @returns {ChatMessage[]}
 */
function placed(messages, { id, prompt = '', text, thinking, started, retryOf }, partial) {
  /** @type {ChatMessage[]} */
  const turn = [
    { id, role: 'user', content: prompt },
    { id, role: 'assistant', content: text, thinking, partial },
  ]
  const others = started && retryOf ? messages.filter((message) => message.id !== retryOf) : messages
  const place = others.findIndex((message) => message.id === id)
  if (place < 0) return [...others, ...turn]
  return [...others.slice(0, place), ...turn, ...others.slice(place + 1).filter((message) => message.id !== id)]
}
