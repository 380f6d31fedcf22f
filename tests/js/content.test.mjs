// Content blocks of replies and histories, with fake sockets.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { connectFake, pong, turn } from './fakes.mjs'

const TOOL = { type: 'tool_use', id: 't', name: 'add', input: { a: 1 } }

/** A server that starts each prompt and sends frames. */
const answering = (frames) => (socket, frame) => {
  pong(socket, frame)
  if (frame.type !== 'prompt') return
  socket.say({ type: 'start', id: frame.id, model: 'm', request: frame.request })
  for (const each of frames) socket.say({ id: frame.id, ...each })
}

test('a reply assembles its content blocks', async (t) => {
  const json = JSON.stringify(TOOL), citation = { type: 'char_location', cited_text: 'x' }
  const { chat } = connectFake(t, answering([
    { type: 'thinking', seq: 1, text: 'Let me ' },
    { type: 'thinking', seq: 2, text: 'see.' },
    { type: 'thinking', seq: 3, text: '', signature: 'sig' },
    { type: 'token', seq: 5, text: 'It is', block: 1 },
    { type: 'token', seq: 6, text: '', citation, block: 1 },
    { type: 'block', seq: 7, partial_json: json.slice(0, 9), block: 2 },
    { type: 'block', seq: 8, partial_json: json.slice(9), block: 2 },
    { type: 'token', seq: 9, text: 'so.', block: 3 },
    { type: 'block', seq: 10, partial_json: '{"type', block: 4 },
    { type: 'done', seq: 10, reason: 'end_turn', usage: {} },
  ]))
  const reply = chat.prompt('Hi')
  await turn()
  await reply.done
  assert.deepEqual([reply.text, reply.thinking], ['It isso.', 'Let me see.'])
  assert.deepEqual(reply.blocks, [
    { type: 'thinking', thinking: 'Let me see.', signature: 'sig' },
    { type: 'text', text: 'It is', citations: [citation] },
    TOOL,
    { type: 'text', text: 'so.' },
  ])
})

test('a history has blocks, thinking, model, usage and times', async (t) => {
  const blocks = [{ type: 'thinking', thinking: 'Hm.', signature: 's' }, { type: 'text', text: 'Hello' }]
  const prompt = { role: 'user', content: 'Hi', id: 'i', began: 5 }
  const reply = { role: 'assistant', content: 'Hello', id: 'i', blocks, model: 'm', usage: { output_tokens: 4 }, began: 5, ended: 6.5 }
  const { chat } = connectFake(t, (socket, { type, conversation, request }) => {
    if (type === 'open') socket.say({ type: 'history', conversation, title: 'T', messages: [prompt, reply], running: [], request })
  })
  await turn()
  const { messages } = await chat.open(chat.conversation)
  assert.deepEqual(messages, [prompt, { ...reply, thinking: 'Hm.' }])
})

test('a gap replaces text, thinking and blocks by what the server has', async (t) => {
  let crashed = false
  const { chat, sockets } = connectFake(t, (socket, { type, id, after, request }, number) => {
    if (type === 'prompt') {
      socket.say({ type: 'start', id, model: 'm', request })
      socket.say({ type: 'thinking', id, seq: 1, text: 'Hm.' })
      socket.say({ type: 'token', id, seq: 2, text: 'one ', block: 1 })
      socket.say({ type: 'token', id, seq: 3, text: 'two', block: 1 })
    } else if (type === 'resume' && after) {
      crashed = number > 1
      socket.say({ type: 'error', code: 'gap', message: 'Less.', retryable: false, request })
    } else if (type === 'resume') {
      socket.say({ type: 'start', id, model: 'm', request })
      socket.say({ type: 'token', id, seq: 2, text: 'one ', block: 1 })
      socket.say({ type: 'done', id, seq: 2, reason: 'end_turn', usage: {} })
    }
  })
  await turn()
  const reply = chat.prompt('Count')
  const iterator = reply[Symbol.asyncIterator]()
  assert.deepEqual((await iterator.next()).value, 'one two')
  sockets[0].onclose({ code: 1006, reason: '' })
  t.mock.timers.tick(10)
  await turn()
  await reply.done
  assert.ok(crashed)
  assert.deepEqual([reply.text, reply.thinking, reply.blocks], ['one ', '', [{ type: 'text', text: 'one ' }]])
  await assert.rejects(iterator.next(), { code: 'gap' }) // it cannot take `two` back
  const later = []
  for await (const text of reply) later.push(text)
  assert.deepEqual(later, ['one '])
})
