import { useEffect, useState } from 'react'
import { useChat } from '../../wsserver/web/react.js' // in your own project: 'wsserver/react'

/** @param {Parameters<typeof useChat>[0] & {onConversation?: (id: string) => void}} props */
export function App({ onConversation, ...options }) {
  const { conversation, messages, status, send, retry, stop, error, connection } = useChat(options)
  const [text, setText] = useState('')
  const busy = status === 'submitted' || status === 'streaming'
  const begun = messages.length > 0

  useEffect(() => {
    if (begun) onConversation?.(conversation) // save the id for the next load of the page
  }, [begun, conversation, onConversation])

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
            {partial && <em> (incomplete: {partial})</em>}
          </li>
        ))}
      </ol>
      {error && <p role="alert">{error.message}</p>}
      <form onSubmit={submit}>
        <input aria-label="Your message" value={text} onChange={(event) => setText(event.target.value)} />
        {busy ? <button type="button" onClick={stop}>Stop</button> : <button>Send</button>}
        {status === 'error' && <button type="button" onClick={retry}>Retry</button>}
      </form>
      <footer role="status">{connection === 'open' ? 'Connected' : `Not connected: ${connection}`}</footer>
    </main>
  )
}
