// Node with the WebSocket library ws and Anthropic's SDK.
import Anthropic from '@anthropic-ai/sdk'
import { WebSocketServer } from 'ws'

const client = new Anthropic()

async function reply(ws, prompt, signal) {
  try {
    const stream = await client.messages.create(
      {
        model: 'claude-sonnet-4-6',
        max_tokens: 8192,
        messages: [{ role: 'user', content: prompt }],
        stream: true,
      },
      { signal },
    )
    for await (const event of stream) {
      if (event.type === 'content_block_delta' && event.delta.type === 'text_delta') {
        ws.send(JSON.stringify({ type: 'token', text: event.delta.text }))
      }
    }
    ws.send(JSON.stringify({ type: 'done', reason: signal.aborted ? 'stopped' : 'end_turn' }))
  } catch (error) {
    const stopped = { type: 'done', reason: 'stopped' }
    ws.send(JSON.stringify(signal.aborted ? stopped : { type: 'error', message: String(error) }))
  }
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
