// The AI SDK over HTTP, with resumable streams and a stop endpoint, as its documentation says
// ("Chatbot Resume Streams"). The chats of this process are its persistence layer.
import { createServer } from 'node:http'
import { Readable } from 'node:stream'
import { anthropic } from '@ai-sdk/anthropic'
import { convertToModelMessages, generateId, streamText, UI_MESSAGE_STREAM_HEADERS } from 'ai'
import { createClient } from 'redis'
import { createResumableStreamContext } from 'resumable-stream'

const chats = new Map()
const work = new Map()
const readChat = (id) => chats.get(id) ?? { id, messages: [], activeStreamId: null }
const saveChat = (chat) => chats.set(chat.id, { ...readChat(chat.id), ...chat })

const socket = { path: process.env.REDIS_SOCKET }
const streamContext = createResumableStreamContext({
  waitUntil: (promise) => void promise,
  publisher: await createClient({ socket }).connect(),
  subscriber: await createClient({ socket }).connect(),
})

async function send({ id, message }) {
  const messages = [...readChat(id).messages, message]
  saveChat({ id, messages, activeStreamId: null })
  const controller = new AbortController()
  const result = streamText({
    model: anthropic('claude-sonnet-4-6'),
    maxOutputTokens: 8192,
    messages: await convertToModelMessages(messages),
    abortSignal: controller.signal,
  })
  return result.toUIMessageStreamResponse({
    originalMessages: messages,
    generateMessageId: generateId,
    onFinish: ({ messages }) => saveChat({ id, messages, activeStreamId: null }),
    async consumeSseStream({ stream }) {
      const streamId = generateId()
      work.set(streamId, controller)
      await streamContext.createNewResumableStream(streamId, () => stream)
      saveChat({ id, activeStreamId: streamId })
    },
  })
}

async function resume(id) {
  const chat = readChat(id)
  if (chat.activeStreamId == null) return new Response(null, { status: 204 })
  const stream = await streamContext.resumeExistingStream(chat.activeStreamId)
  return new Response(stream, { headers: UI_MESSAGE_STREAM_HEADERS })
}

function stop(id) {
  const { activeStreamId } = readChat(id)
  work.get(activeStreamId)?.abort()
  if (readChat(id).activeStreamId === activeStreamId) saveChat({ id, activeStreamId: null })
  return Response.json({ success: true })
}

async function answer(request) {
  const [, , , id, action] = request.url.split('/')
  if (request.method === 'GET') return action ? resume(id) : Response.json(readChat(id))
  if (action === 'stop') return stop(id)
  return send(await new Response(Readable.toWeb(request)).json())
}

createServer(async (request, response) => {
  try {
    const { status, headers, body } = await answer(request)
    response.writeHead(status, Object.fromEntries(headers))
    response.flushHeaders()
    if (body) Readable.fromWeb(body).on('error', () => response.destroy()).pipe(response)
    else response.end()
  } catch (error) {
    console.error(error)
    response.writeHead(500).end()
  }
}).listen(Number(process.env.PORT), '127.0.0.1')
