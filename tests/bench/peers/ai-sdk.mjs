// Node with the WebSocket library ws and the AI SDK.
import { anthropic } from '@ai-sdk/anthropic'
import { streamText } from 'ai'
import { WebSocketServer } from 'ws'

async function reply(ws, prompt, abortSignal) {
  let failure
  const { textStream } = streamText({
    model: anthropic('claude-sonnet-4-6'),
    maxOutputTokens: 8192,
    prompt,
    abortSignal,
    onError: ({ error }) => (failure = error),
  })
  for await (const text of textStream) ws.send(JSON.stringify({ type: 'token', text }))
  const done = { type: 'done', reason: abortSignal.aborted ? 'stopped' : 'end_turn' }
  ws.send(JSON.stringify(failure ? { type: 'error', message: String(failure) } : done))
}

const server = new WebSocketServer({ host: '127.0.0.1', port: Number(process.env.PORT) })
server.on('connection', (ws) => {
  let controller = new AbortController()
  ws.on('error', console.error)
  ws.on('message', (data) => {
    const frame = JSON.parse(data)
    if (frame.type === 'stop') {
      controller.abort()
    } else {
      controller = new AbortController()
      void reply(ws, frame.prompt, controller.signal)
    }
  })
  ws.on('close', () => controller.abort())
})
