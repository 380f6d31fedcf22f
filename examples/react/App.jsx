import { useState } from 'react'
import { useChat } from './useChat.js'

/** @param {Parameters<typeof useChat>[0]} props */
export function App(props) {
  const { messages, status, send, stop, error, connection } = useChat(props)
  const [text, setText] = useState('')
  const busy = status === 'submitted' || status === 'streaming'

  function submit(/** @type {import('react').FormEvent} */ event) {
    event.preventDefault()
    if (!text.trim()) return
    send(text)
    setText('')
  }

  return (
    <main>
      <ol aria-live="polite" aria-busy={busy}>
        {messages.map(({ id, role, content, thinking, partial }) => (
          <li key={id + role} className={role}>
            {thinking && <details><summary>Thinking</summary>{thinking}</details>}
            <span style={{ whiteSpace: 'pre-wrap' }}>{content}</span>
            {partial && <em> (not whole: {partial})</em>}
          </li>
        ))}
      </ol>
      {error && <p role="alert">{error.message}</p>}
      <form onSubmit={submit}>
        <input aria-label="Your message" value={text} onChange={(event) => setText(event.target.value)} />
        {busy ? <button type="button" onClick={stop}>Stop</button> : <button>Send</button>}
      </form>
      <footer role="status">{connection === 'open' ? 'Connected' : `Not connected: ${connection}`}</footer>
    </main>
  )
}
