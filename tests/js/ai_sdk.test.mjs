// The transport for the AI SDK, with fake sockets.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { readUIMessageStream } from '../../.tools/node_modules/ai/dist/index.js'
import { ChatTransport } from '../../wsserver/web/ai-sdk.js'
import { connectFake, turn } from './fakes.mjs'

const question = { id: 'q', role: 'user', parts: [{ type: 'text', text: 'Count' }] }
const make = (...given) => new ChatTransport(...given)

test('a crash of the server takes back the text that the server lost', async (t) => {
  const { chat: transport, sockets } = connectFake(t, (socket, { type, id, after, request }) => {
    if (type === 'prompt') {
      socket.say({ type: 'start', id, model: 'm', conversation: 'c', request })
      socket.say({ type: 'thinking', id, seq: 1, text: 'Hm.' })
      socket.say({ type: 'token', id, seq: 2, text: 'one ', block: 1 })
      socket.say({ type: 'token', id, seq: 3, text: 'two', block: 1 })
    } else if (type === 'resume' && after) {
      socket.say({ type: 'error', code: 'gap', message: 'Less.', retryable: false, request })
    } else if (type === 'resume') {
      socket.say({ type: 'start', id, model: 'm', request })
      socket.say({ type: 'thinking', id, seq: 1, text: 'Hm.' })
      socket.say({ type: 'token', id, seq: 2, text: 'one ', block: 1 })
      socket.say({ type: 'done', id, seq: 2, reason: 'end_turn', usage: {} })
    }
  }, undefined, make)
  const request = { chatId: 'chat-of-the-test-1', trigger: 'submit-message', messages: [question] }
  const stream = await transport.sendMessages(request)
  const said = []
  for await (const { parts } of readUIMessageStream({ stream })) {
    const text = parts.map(({ type, text }) => type === 'text' ? text : '').join('')
    if (text !== said.at(-1)) said.push(text)
    if (text !== 'one two' || sockets.length > 1) continue
    sockets[0].onclose({ code: 1006, reason: '' })
    t.mock.timers.tick(10)
    await turn()
  }
  assert.deepEqual(said, ['', 'one two', '', 'one '])
})

test('no connection is made before it is needed, and another one after close', async (t) => {
  const { chat: transport, sockets } = connectFake(t, (socket, { type, conversation, request }) => {
    const history = { type: 'history', conversation, title: '', messages: [], running: [], request }
    if (type === 'open') socket.say(history)
  }, undefined, make)
  await turn()
  assert.equal(sockets.length, 0)
  for (const count of [1, 2]) {
    assert.deepEqual(await transport.history('chat-of-the-test-1'), [])
    assert.equal(sockets.length, count)
    transport.close()
  }
})

test('a token that the server does not accept fails all calls, and the next one tries again', async (t) => {
  const tokens = ['old', 'old', 'new']
  const { chat: transport, sockets } = connectFake(t, (socket, { type, conversation, request }) => {
    const [{ token }] = socket.sent
    if (token === 'old') socket.say({ type: 'error', code: 'unauthenticated', message: 'No.' })
    else if (type === 'open') socket.say({ type: 'history', conversation, title: '', messages: [], running: [], request })
  }, { token: () => tokens.shift() }, make)
  await assert.rejects(transport.history('chat-of-the-test-1'), { code: 'unauthenticated' })
  const request = { chatId: 'chat-of-the-test-1', trigger: 'submit-message', messages: [question] }
  const reader = (await transport.sendMessages(request)).getReader()
  await assert.rejects(reader.read(), { code: 'unauthenticated', message: 'The server does not accept the token.' })
  assert.deepEqual(await transport.history('chat-of-the-test-1'), [])
  assert.equal(sockets.length, 3)
})

test('an abort without a connection ends a call at once', async (t) => {
  const { chat: transport } = connectFake(t, () => {}, undefined, make)
  const controller = new AbortController()
  const answer = { id: 'a', role: 'assistant', parts: [{ type: 'text', text: 'One.' }] }
  const request = { chatId: 'chat-of-the-test-1', abortSignal: controller.signal }
  const sent = transport.sendMessages({ ...request, trigger: 'submit-message', messages: [question, answer, question] })
  const resumed = transport.reconnectToStream(request)
  controller.abort()
  await assert.rejects(sent, { name: 'AbortError' })
  await assert.rejects(resumed, { name: 'AbortError' })
  await assert.rejects(transport.reconnectToStream(request), { name: 'AbortError' })
})
