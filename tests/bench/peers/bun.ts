// Bun's own server, with Anthropic's SDK.
import Anthropic from '@anthropic-ai/sdk'

const client = new Anthropic()
type Data = { controller?: AbortController }

async function reply(ws: Bun.ServerWebSocket<Data>, prompt: string) {
  const controller = new AbortController()
  ws.data.controller = controller
  try {
    const stream = await client.messages.create(
      {
        model: 'claude-sonnet-4-6',
        max_tokens: 8192,
        messages: [{ role: 'user', content: prompt }],
        stream: true,
      },
      { signal: controller.signal },
    )
    for await (const event of stream) {
      if (event.type === 'content_block_delta' && event.delta.type === 'text_delta') {
        ws.send(JSON.stringify({ type: 'token', text: event.delta.text }))
      }
    }
    const reason = controller.signal.aborted ? 'stopped' : 'end_turn'
    ws.send(JSON.stringify({ type: 'done', reason }))
  } catch (error) {
    const frame = controller.signal.aborted
      ? { type: 'done', reason: 'stopped' }
      : { type: 'error', message: String(error) }
    ws.send(JSON.stringify(frame))
  }
}

const server = Bun.serve<Data, never>({
  hostname: '127.0.0.1',
  port: Number(process.env.PORT),
  fetch(request, server) {
    if (server.upgrade(request, { data: {} })) return
    return new Response('WebSocket only', { status: 426 })
  },
  websocket: {
    message(ws, message) {
      const frame = JSON.parse(String(message))
      if (frame.type === 'stop') ws.data.controller?.abort()
      else void reply(ws, frame.prompt)
    },
    close(ws) {
      ws.data.controller?.abort()
    },
  },
})
console.log(`listening on ${server.port}`)
