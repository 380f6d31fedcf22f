// Drives the client for tests/conformance.md. Commands and answers are lines of JSON.
import { createInterface } from 'node:readline'
import { connect } from '../../wsserver/web/client.js'
import { WebSocket } from './stage.mjs'

const [, , url, given] = process.argv
const token = given && (() => given)
const chat = connect(url, { WebSocket, token, firstPause: 1, longestPause: 20 })
const replies = new Map(), ends = new Map(), errors = []
chat.on('error', (error) => errors.push(String(error)))
chat.on('reply', (reply) => show(reply.id, reply))

function show(name, reply) {
  replies.set(name, reply)
  ends.set(name, {})
  reply.done.then((done) => { ends.get(name).done = done }, ({ code, message, retryable, retryAfter }) => {
    ends.get(name).error = { code, message, retryable, retry_after: retryAfter }
  })
}

const requests = {
  open: async ({ conversation, ...options }) => {
    const { title, messages, replies: running } = await chat.open(conversation, options)
    for (const reply of running) show(reply.id, reply)
    return { title, messages: messages.map(({ role, content, partial = null }) => [role, content, partial]) }
  },
  history: (keys) => requests.open(keys),
  conversations: async () => (await chat.list()).items.map(({ id, title }) => [id, title]),
  rename: async ({ conversation, title }) => ({ ...await chat.rename(conversation, title) }),
  delete: async ({ conversation }) => ({ ...await chat.delete(conversation) }),
}

const orders = {
  prompt: ({ reply, text, conversation, on_busy, retry_of }) => show(reply, chat.prompt(text, {
    conversation: conversation ?? undefined, onBusy: on_busy, retryOf: replies.get(retry_of)?.id ?? retry_of ?? undefined,
  })),
  stop: ({ reply }) => { replies.get(reply).stop() },
  resume: ({ reply, of, named }) => show(reply, chat.resume(named ?? replies.get(of).id)),
  seen: ({ reply }) => {
    const { started = false, queued, text = '', thinking = '' } = replies.get(reply) ?? {}
    return { started, queued, text, thinking, ...ends.get(reply) }
  },
  request: ({ kind, ...keys }) => requests[kind](keys).catch(({ code }) => ({ error: code })),
  close: () => { chat.close(); return errors },
}

for await (const line of createInterface(process.stdin)) {
  const { do: what, ...keys } = JSON.parse(line)
  process.stdout.write(`${JSON.stringify(await orders[what](keys) ?? null)}\n`)
}
