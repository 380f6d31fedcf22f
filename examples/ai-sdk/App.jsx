import { useChat } from '@ai-sdk/react'
import { useState } from 'react'

/** @param {{id: string, transport: import('ai').ChatTransport<any>, messages?: import('ai').UIMessage[]}} props */
export function App({ id, transport, messages: initial }) {
  const { messages, status, error, sendMessage, regenerate, stop } = useChat({
    id, // the conversation
    messages: initial,
    transport,
    resume: true, // go on with a reply that runs
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
            {message.parts.map((part, number) => {
              if (part.type === 'text') return <span key={number} style={{ whiteSpace: 'pre-wrap' }}>{part.text}</span>
              if (part.type === 'reasoning') return <details key={number}><summary>Thinking</summary>{part.text}</details>
              return part.type === 'source-url' && <a key={number} href={part.url}> [{part.title}]</a>
            })}
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
