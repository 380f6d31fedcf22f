// A chat over server-sent events as a React hook: `{messages, streaming, send, stop}`.

import { useEffect, useRef, useState } from 'react'

/**
 * @param {string} url the address of `/api/chat`
 * @returns {{
 *   messages: {role: 'user' | 'assistant', content: string}[],
 *   streaming: boolean,
 *   send: (content: string) => Promise<void>,
 *   stop: () => void,
 * }} `stop` ends the reply and closes the request to the model.
 */
export function useChat(url = '/api/chat') {
  const [messages, setMessages] = useState([])
  const [streaming, setStreaming] = useState(false)
  const controller = useRef(null)
  useEffect(() => () => controller.current?.abort(), [])

  async function send(content) {
    if (controller.current) return
    const asked = [...messages, { role: 'user', content }]
    let reply = ''
    const show = (text) => {
      reply += text
      setMessages([...asked, { role: 'assistant', content: reply }])
    }
    show('')
    setStreaming(true)
    controller.current = new AbortController()
    try {
      const response = await fetch(url, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ messages: asked.filter((message) => message.content) }),
        signal: controller.current.signal,
      })
      if (!response.ok) throw new Error((await response.json()).message)
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
      let rest = ''
      for (let read; !(read = await reader.read()).done;) {
        const lines = (rest + read.value).split('\n')
        rest = lines.pop()
        for (const line of lines) {
          if (!line.startsWith('data: ')) continue
          const event = JSON.parse(line.slice(6))
          if (event.type === 'token') show(event.text)
          if (event.type === 'error') throw new Error(event.message)
        }
      }
    } catch (error) {
      if (error.name !== 'AbortError') show(`\n[${error.message}]`)
    } finally {
      controller.current = null
      setStreaming(false)
    }
  }

  return { messages, streaming, send, stop: () => controller.current?.abort() }
}
