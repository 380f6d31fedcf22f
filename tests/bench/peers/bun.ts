// Bun's WebSocket server with Anthropic's SDK.
import Anthropic from '@anthropic-ai/sdk'

const client = new Anthropic()
type Data = { controller: AbortController }

async function reply(ws: Bun.ServerWebSocket<Data>, prompt: string, signal: AbortSignal) {
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

Bun.serve<Data, never>({
  hostname: '127.0.0.1',
  port: Number(process.env.PORT),
  fetch(request, server) {
    if (server.upgrade(request, { data: { controller: new AbortController() } })) return
    return new Response('WebSocket only', { status: 426 })
  },
  websocket: {
    message(ws, message) {
      const frame = JSON.parse(String(message))
      if (frame.type === 'stop') {
        ws.data.controller.abort()
      } else {
        ws.data.controller = new AbortController()
        void reply(ws, frame.prompt, ws.data.controller.signal)
      }
    },
    close(ws) {
      ws.data.controller.abort()
    },
  },
})
