// Tokens, close codes and broken frames, of the JavaScript client.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { newId } from '../../wsserver/web/client.js'
import { event, join, OlderWebSocket, passed, rejects, says, soon, Stage, state, WebSocket } from './stage.mjs'

let stage
before(() => { stage = new Stage() })
after(() => stage.end())

// Who the client is.

test('the token is the first frame, and an invalid one is not sent again', async (t) => {
  const { chat, sockets, connections } = await stage.serve(t, { tokens: { good: ['ada', null] }, token: 'bad' })
  const reply = chat.prompt('say hello')
  await state(chat, 'unauthenticated')
  assert.equal(sockets[0].sent[0].type, 'auth')
  assert.equal(await connections(), 1)
  assert.equal(reply.ended, false)
  chat.setToken('good')
  await soon(reply.done)
  assert.deepEqual([reply.text, sockets.length], ['hello', 2])
})

test('the models arrive with the authentication', async (t) => {
  const { chat } = await stage.serve(t, { tokens: { good: ['ada', null] }, token: 'good' })
  const told = await event(chat, 'models')
  assert.deepEqual([told.models, chat.models], [['troupe'], ['troupe']])
})

test('a token function is called for each connection, and before the expiry', async (t) => {
  let asked = 0
  const token = async () => `t${++asked}`
  const tokens = { t1: ['ada', 11], t2: ['ada', null], t3: ['ada', null] }
  const { chat, sockets, line } = await stage.serve(t, { tokens, token })
  await soon(chat.prompt('say a').done)
  const renewed = await event(chat, 'message', ({ type }) => type === 'authenticated')
  assert.deepEqual([renewed.expires, asked, sockets.length], [undefined, 2, 1])
  await line('cut')
  await line('mend')
  await soon(chat.prompt('say b').done)
  assert.ok(asked >= 3)
})

test('an expired token is replaced if there is another', async (t) => {
  const tokens = { short: ['ada', 0.3], long: ['ada', null] }
  let asked = 0
  const client = await stage.serve(t, { tokens, token: () => (asked++ ? 'long' : 'short') }), { chat, sockets } = client
  const reply = chat.prompt('say a; wait exp; say b')
  await says(reply, 'a')
  await passed(client, ({ reason }) => reason === 'unauthenticated')
  await stage.release('exp')
  await soon(reply.done)
  assert.deepEqual([reply.text, sockets.length], ['ab', 2])
})

test('a token of another principal begins a new connection', async (t) => {
  const { chat, sockets } = await stage.serve(t, { tokens: { one: ['ada', null], two: ['bob', null] }, token: 'one' })
  await soon(chat.prompt('say a').done)
  chat.setToken('two')
  await state(chat, 'waiting')
  await soon(chat.prompt('say b').done)
  assert.equal(sockets.length, 2)
})

test('a failing token function is called again', async (t) => {
  let asked = 0
  const token = async () => { if (++asked < 3) throw new Error('offline'); return 'late' }
  const { chat } = await stage.serve(t, { tokens: { late: ['ada', null] }, token })
  await soon(chat.prompt('say a').done)
  assert.equal(asked, 3)
})

// Close codes.

test('a call after an idle close connects again', async (t) => {
  const { chat, sockets, dismiss } = await stage.serve(t)
  await soon(chat.prompt('say a').done)
  await dismiss(1000, 'idle')
  await state(chat, 'idle')
  assert.equal(sockets.length, 1)
  await soon(chat.prompt('say b').done)
  await dismiss(1000, 'idle')
  await state(chat, 'idle')
  assert.ok((await soon(chat.list())).items)
  assert.equal(sockets.length, 3)
})

for (const code of [1002, 1007, 1008]) {
  test(`close code ${code} is final`, async (t) => {
    const { chat, dismiss, connections } = await stage.serve(t)
    const reply = chat.prompt(`say a; wait never ${code}`)
    await says(reply, 'a')
    const told = event(chat, 'state')
    await dismiss(code, 'enough')
    assert.deepEqual(await told, { state: 'closed', code, reason: 'enough' })
    await rejects(reply, { code: 'closed' })
    await rejects(chat.prompt('say b'), { code: 'closed' })
    await assert.rejects(chat.list(), { code: 'closed' })
    assert.equal(await connections(), 1)
  })
}

for (const code of [1011, 1012, 1013]) {
  test(`close code ${code} reconnects`, async (t) => {
    const client = await stage.serve(t), { chat, dismiss } = client
    const reply = chat.prompt(`say a; wait on ${code}; say b`)
    await says(reply, 'a')
    await dismiss(code)
    await passed(client, (change) => change.code === code)
    await stage.release(`on ${code}`)
    await soon(reply.done)
    assert.equal(reply.text, 'ab')
  })
}

for (const Class of [WebSocket, OlderWebSocket]) {
  test(`only a message over the limit fails, with ${Class.name}`, async (t) => {
    const { chat, sockets } = await stage.serve(t, { WebSocket: Class })
    const other = chat.prompt(`say a; wait long ${Class.name}; say b`)
    await says(other, 'a')
    const long = chat.prompt('x'.repeat(100_000), { conversation: newId() })
    const title = assert.rejects(soon(chat.rename(newId(), 'é'.repeat(90_000))), { code: 'too_long' })
    await rejects(long, { code: 'too_long' })
    await title
    await stage.release(`long ${Class.name}`)
    await soon(other.done)
    assert.equal(other.text, 'ab')
    if (Class !== OlderWebSocket) assert.equal(sockets.length, 1) // refused without being sent
  })
}

test('after close all calls fail', async (t) => {
  const { chat, sockets } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never 8')
  await says(reply, 'a')
  chat.close()
  assert.equal(chat.state, 'closed')
  await rejects(reply, { code: 'closed' })
  await rejects(chat.resume(reply.id), { code: 'closed' })
  assert.equal(sockets.length, 1)
})

test('frames of unknown types reach only the message event', async (t) => {
  const { chat, sockets, frames } = await stage.serve(t)
  const reply = chat.prompt('say a; wait odd; say b')
  await says(reply, 'a')
  sockets[0].onmessage({ data: JSON.stringify({ type: 'weather', id: reply.id, seq: 99, text: 'sun' }) })
  sockets[0].onmessage({ data: JSON.stringify({ type: 'token', id: newId(), seq: 1, text: 'whose?' }) })
  await stage.release('odd')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
  assert.ok(frames.some(({ type }) => type === 'weather'))
})

for (const said of [
  'no JSON', '[]', 'null', '1', '{"type":"token","id":"ID","text":"x"}', '{"type":"token","id":"ID","seq":1}',
  '{"type":"history","conversation":"ID","messages":[]}', '{"type":"conversations"}',
  '{"type":"conversations","items":[null]}', '{"type":"conversations","items":[{"id":"a","title":"b","updated":1e300}]}',
  '{"type":"history","messages":[null],"running":[]}', '{"type":"history","messages":[{"role":"user"}],"running":[]}',
  '{"type":"history","messages":[{"role":"user","content":"a","blocks":[null]}],"running":[]}',
  '{"type":"history","messages":[{"role":"user","content":"a","blocks":5}],"running":[]}',
  '{"type":"history","messages":[{"role":"user","content":"a","began":1e300}],"running":[]}',
  '{"type":"start","id":"ID","prompt":[]}', '{"type":"start","id":"ID","blocks":5}', '{"type":"start","id":"ID","blocks":[5]}',
  '{"type":"done","id":"ID","seq":0,"reason":5}', '{"type":"done","id":"ID","seq":0,"reason":"stopped","by":[]}',
  '{"type":"error","id":"ID"}', '{"type":"error","id":"ID","code":"internal","ref":5}',
  '{"type":"hello","models":5}', '{"type":"hello","models":[null]}', '{"type":"hello","limits":null}', '{"type":"authenticated","models":{}}',
  '{"type":"renamed","conversation":"a","title":5}', '{"type":"deleted","conversation":null}',
]) {
  test(`a frame that violates the protocol closes the chat: ${said}`, async (t) => {
    class Broken extends EventTarget {
      constructor() {
        super()
        setTimeout(() => this.onopen())
      }
      send(data) {
        const { type, id } = JSON.parse(data)
        if (type === 'ping') setTimeout(() => this.onmessage({ data: '{"type":"pong"}' }))
        if (type === 'prompt') setTimeout(() => this.onmessage({ data: said.replace('ID', id) }))
      }
      close() {}
    }
    const { chat } = join(t, 'ws://localhost', { WebSocket: Broken })
    const list = assert.rejects(soon(chat.list(), 'the list'), { code: 'closed' })
    const reply = chat.prompt('Hi')
    await rejects(reply, { code: 'closed', message: /violates the protocol/ })
    await list
    assert.deepEqual([reply.text, chat.state], ['', 'closed'])
  })
}
