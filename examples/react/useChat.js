import { useCallback, useEffect, useRef, useState } from 'react'
import { connect, newId } from '../../wsserver/web/client.js' // in a project of your own, a copy of it

/**
 * @typedef {import('../../wsserver/web/client.js').Chat} Chat
 * @typedef {import('../../wsserver/web/client.js').Reply} Reply
 * @typedef {{id: string, role: 'user' | 'assistant', content: string, thinking?: string, partial?: string}} ChatMessage
 *   Both messages of a turn have its id.
 * @typedef {'submitted' | 'streaming' | 'ready' | 'error'} Status Of the newest reply.
 */

/**
 * A chat in a component.
 * @param {object} options
 * @param {string} options.url
 * @param {string | (() => string | Promise<string>)} [options.token]
 * @param {string} [options.conversation] One that exists: its messages are loaded, and what any
 *   other page asks in it is shown as well. Without it a new one begins.
 */
export function useChat({ url, token, conversation }) {
  const [messages, setMessages] = useState(/** @type {ChatMessage[]} */ ([]))
  const [status, setStatus] = useState(/** @type {Status} */ ('ready'))
  const [error, setError] = useState(/** @type {Error | undefined} */ (undefined))
  const [connection, setConnection] = useState(/** @type {Chat['state']} */ ('connecting'))
  const chat = useRef(/** @type {Chat | undefined} */ (undefined))
  const newest = useRef(/** @type {Reply | undefined} */ (undefined))
  const tokens = useRef(token)
  const fixed = typeof token === 'function' ? fresh : token

  function fresh() {
    return typeof tokens.current === 'function' ? tokens.current() : tokens.current ?? ''
  }

  const show = useCallback((/** @type {Reply} */ reply) => {
    newest.current = reply
    const update = () => {
      setMessages((messages) => placed(messages, reply))
      if (newest.current !== reply || reply.ended) return
      setStatus(reply.text || reply.thinking ? 'streaming' : 'submitted')
    }
    const end = (/** @type {Status} */ status, /** @type {Error | undefined} */ error = undefined) => {
      if (newest.current !== reply) return
      setStatus(status)
      setError(error)
    }
    update()
    reply.addEventListener('change', update)
    reply.done.then(
      ({ by }) => {
        if (by) setMessages((messages) => placed(messages, reply, by))
        end('ready')
      },
      (error) => {
        setMessages((messages) => placed(messages, reply, error.code))
        if (error.code !== 'closed') end('error', error)
      },
    )
  }, [])

  useEffect(() => {
    const current = connect(url, { token: fixed, conversation: conversation ?? newId() })
    chat.current = current
    current.on('state', ({ state }) => setConnection(state))
    current.on('reply', show)
    current.on('history', ({ messages, replies }) => {
      setMessages(messages.map(({ id = '', role, content, partial }) => ({ id, role, content, partial })))
      for (const reply of replies) show(reply)
    })
    if (conversation !== undefined) {
      current.open(conversation).catch((error) => { if (error.code !== 'closed') setError(error) })
    }
    return () => current.close()
  }, [url, conversation, show])

  useEffect(() => {
    tokens.current = token
    if (typeof token !== 'function') chat.current?.setToken(token)
  }, [token])

  /** Ask; a reply that still runs is interrupted. */
  const send = useCallback((/** @type {string} */ text) => {
    if (!chat.current) return
    setError(undefined)
    show(chat.current.prompt(text, { onBusy: 'interrupt' }))
  }, [show])

  /** Stop what runs. */
  const stop = useCallback(() => { newest.current?.stop() }, [])

  return { messages, status, send, stop, error, connection }
}

/**
 * Put a reply where it is already, or at the end.
 * @param {ChatMessage[]} messages
 * @param {Reply} reply
 * @param {string} [partial]
 * @returns {ChatMessage[]}
 */
function placed(messages, { id, prompt = '', text, thinking }, partial) {
  /** @type {ChatMessage[]} */
  const turn = [
    { id, role: 'user', content: prompt },
    { id, role: 'assistant', content: text, thinking, partial },
  ]
  const place = messages.findIndex((message) => message.id === id)
  if (place < 0) return [...messages, ...turn]
  return [...messages.slice(0, place), ...turn, ...messages.slice(place + 1).filter((message) => message.id !== id)]
}
