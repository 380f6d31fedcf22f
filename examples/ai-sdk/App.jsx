// A chat with the AI SDK's `useChat` and its default transport, over server-sent events.

import { useChat } from '@ai-sdk/react'
import { DefaultChatTransport } from 'ai'
import { useState } from 'react'

/** @param {{id: string, api?: string, messages?: import('ai').UIMessage[]}} props */
export function App({ id, api = '/api/chat', messages: initial }) {
  const { messages, status, error, sendMessage, regenerate, stop } = useChat({
    id, // the conversation; keep it over a reload
    messages: initial,
    resume: true, // go on with a reply that runs
    transport: new DefaultChatTransport({ api }),
  })
  const [text, setText] = useState('')
  const busy = status === 'submitted' || status === 'streaming'

  function submit(/** @type {import('react').FormEvent} */ event) {
    event.preventDefault()
    if (!text.trim()) return
    sendMessage({ text })
    setText('')
  }

  return (
    <main>
      <ol aria-live="polite" aria-busy={busy}>
        {messages.map((message) => (
          <li key={message.id} className={message.role}>
            {message.parts.map((part, number) => part.type === 'text'
              ? <span key={number}>{part.text}</span>
              : part.type === 'reasoning' && <details key={number}><summary>Thinking</summary>{part.text}</details>)}
            {message.metadata?.reason === 'stopped' && <em> (stopped)</em>}
          </li>
        ))}
      </ol>
      {error && <p role="alert">{error.message}</p>}
      <form onSubmit={submit}>
        <input aria-label="Your message" value={text} onChange={(event) => setText(event.target.value)} />
        {busy ? <button type="button" onClick={stop}>Stop</button> : <button>Send</button>}
        {!busy && messages.length > 0 && <button type="button" onClick={() => regenerate()}>Again</button>}
      </form>
      <footer role="status">{status}</footer>
    </main>
  )
}
