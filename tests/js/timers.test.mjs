// Timers of the JavaScript client, with fake time.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { connect } from '../../wsserver/web/client.js'
import { advance, connectFake, pong, turn } from './fakes.mjs'

test('back-off is random below a doubling bound', async (t) => {
  const pauses = [], { random } = Math
  t.after(() => { Math.random = random })
  t.mock.timers.enable({ apis: ['setTimeout'] })
  class Refused { constructor() { throw new Error('refused') } }
  const bounds = []
  Math.random = () => 0.5
  const chat = connect('ws://localhost:1/', { WebSocket: Refused })
  t.after(() => chat.close())
  for (let n = 0; n < 7; n++) {
    await new Promise((resolve) => { setImmediate(resolve) })
    let waited = 0
    while (chat.state === 'waiting') { t.mock.timers.tick(125); waited += 125 }
    pauses.push(waited)
    bounds.push(Math.min(15_000, 500 * 2 ** n) / 2)
  }
  assert.deepEqual(pauses, bounds.map((pause) => Math.ceil(pause / 125) * 125))
})

test('a suspended page sends another ping before it closes', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  let clock = 0
  t.mock.method(Date, 'now', () => clock)
  let socket
  class Fake {
    constructor() { socket = this; this.pings = 0 }
    open() {
      this.onopen()
      this.onmessage({ data: '{"type":"hello"}' })
      this.pings = 1
    }
    send() { this.pings++ }
    close() {}
    answer() { this.onmessage({ data: '{"type":"pong"}' }) }
  }
  const begin = async () => {
    const chat = connect('ws://localhost:1/', { WebSocket: Fake })
    await Promise.resolve()
    await Promise.resolve()
    socket.open()
    return chat
  }
  const wake = (asleep) => { clock += 15_000 + asleep; t.mock.timers.tick(15_000) }
  const chat = await begin()
  wake(0)
  assert.equal(chat.state, 'waiting') // awake, and not answered
  chat.close()
  const other = await begin()
  for (let n = 0; n < 3; n++) {
    wake(45_000) // as in the background, where timers are rare
    assert.deepEqual([other.state, socket.pings], ['open', 2 * n + 2])
    socket.answer()
    wake(45_000)
  }
  wake(45_000)
  assert.equal(other.state, 'open')
  wake(45_000)
  assert.equal(other.state, 'waiting') // twice in a row
  other.close()
})

for (const [when, before] of [['the link falls silent after the prompt', false], ['it was silent before', true]]) {
  test(`silence during a reply closes the connection within 10 s: ${when}`, async (t) => {
    let silent = false
    const { chat, sockets } = connectFake(t, (socket, frame) => {
      if (silent) return
      pong(socket, frame)
      if (frame.type === 'prompt') socket.say({ type: 'start', id: frame.id, request: frame.request })
    })
    await turn()
    t.mock.timers.tick(100)
    silent = before
    const reply = chat.prompt('Hi')
    await advance(t, () => false, 5_000 * !before)
    silent = true
    const [socket] = sockets
    assert.ok(await advance(t, () => sockets.length > 1) <= 10_000)
    assert.ok(socket.terminated) // and not waited for
    assert.equal(reply.ended, false)
  })
}

test('an error without a close reconnects', async (t) => {
  const { sockets } = connectFake(t)
  await turn()
  t.mock.timers.tick(100)
  sockets[0].onerror({})
  const waited = await advance(t, () => sockets.length > 1)
  assert.ok(waited <= 1_000, `${waited} ms`)
})

test('an error before a close reconnects once', async (t) => {
  const { sockets } = connectFake(t)
  await turn()
  t.mock.timers.tick(100)
  sockets[0].onerror({})
  sockets[0].onclose({ code: 1006, reason: '' })
  await advance(t, () => false, 2_000)
  assert.equal(sockets.length, 2)
})

test('an idle connection gets fewer pings', async (t) => {
  const { chat, sockets } = connectFake(t, pong)
  await turn()
  await advance(t, () => false, 60_000)
  assert.ok(sockets[0].sent.filter(({ type }) => type === 'ping').length <= 6)
  assert.equal(chat.state, 'open')
})

test('a large answer may take longer than the heartbeat', async (t) => {
  const { chat, sockets } = connectFake(t, (socket, { type, id, request }) => {
    if (type === 'prompt') socket.say({ type: 'start', id, request })
  })
  await turn()
  chat.prompt('Hi')
  const opened = chat.open('c'.repeat(16))
  await advance(t, () => false, 9_000)
  assert.equal(sockets.length, 1)
  const { request } = sockets[0].sent.find(({ type }) => type === 'open')
  sockets[0].say({ type: 'history', conversation: 'c'.repeat(16), messages: [], running: [], request })
  await opened
})

for (const [how, answer] of Object.entries({
  'by nothing but life': pong,
  'by nothing': () => {},
  'by what nobody asked for': (socket, frame) => { pong(socket, frame); socket.say({ type: 'conversations', items: [], request: 'other' }) },
  'by an error about nothing': (socket, frame) => {
    pong(socket, frame)
    if (frame.type !== 'ping') socket.say({ type: 'error', code: 'invalid_frame', message: 'What?', retryable: false })
  },
  'by limits without end': (socket, { type, request }) => {
    if (type !== 'ping') socket.say({ type: 'error', code: 'limit', message: 'Later.', retryable: true, retry_after: 1, request })
  },
  'by a cluster without Redis': (socket, { type, request }) => {
    if (type === 'ping') socket.say({ type: 'pong' })
    else socket.say({ type: 'error', code: 'unavailable', message: 'Later.', retryable: true, retry_after: 1, request })
  },
  'by a shutdown that does not come': (socket, { type, request }) => {
    if (type === 'ping') socket.say({ type: 'pong' })
    else socket.say({ type: 'error', code: 'shutting_down', message: 'Later.', retryable: true, request })
  },
})) {
  test(`every call settles if it is answered ${how}`, async (t) => {
    const { chat, sockets } = connectFake(t, answer)
    await turn()
    const settled = new Set()
    const conversation = 'c'.repeat(16)
    const calls = {
      list: chat.list(), open: chat.open(conversation), rename: chat.rename(conversation, 'x'), delete: chat.delete(conversation),
      prompt: chat.prompt('Hi').done, resume: chat.resume('r'.repeat(16)).done, stop: chat.prompt('Ho').stop(),
    }
    for (const [name, call] of Object.entries(calls)) call.catch(() => {}).then(() => settled.add(name))
    const passed = await advance(t, () => settled.size === 7)
    assert.deepEqual([...settled].sort(), Object.keys(calls).sort())
    assert.ok(passed <= 60_000, `${passed} ms`)
    assert.equal(chat.replies.size, 0)
    assert.ok(sockets.length < 10)
  })
}

test('a prompt without an answer in time is stopped', async (t) => {
  const { chat, sockets } = connectFake(t, pong)
  await turn()
  const reply = chat.prompt('Hi')
  await advance(t, () => reply.ended)
  await assert.rejects(reply.done, { code: 'no_answer', retryable: true })
  assert.equal(sockets[0].sent.at(-1).id, reply.id)
  assert.equal(sockets[0].sent.at(-1).type, 'stop')
})

for (const [skew, name] of [[0, 'right'], [3_600_000, 'an hour ahead'], [-3_600_000, 'an hour behind']]) {
  test(`a token is renewed once if the clock is ${name}`, async (t) => {
    t.mock.timers.enable({ apis: ['setTimeout', 'Date'], now: 10_000_000 })
    const start = Date.now()
    let asked = 0, socket
    class Fake {
      constructor() { socket = this; queueMicrotask(() => { this.onopen(); this.onmessage({ data: '{"type":"hello","auth":true}' }) }) }
      send(data) {
        const { type, request } = JSON.parse(data)
        if (type === 'ping') this.onmessage({ data: '{"type":"pong"}' })
        else {
          const expires = (Date.now() - skew) / 1000 + 600
          this.onmessage({ data: JSON.stringify({ type: 'authenticated', principal: 'ada', expires, expires_in: 600, request }) })
        }
      }
      close() {}
    }
    const chat = connect('ws://localhost:1/', { WebSocket: Fake, token: async () => `t${++asked}` })
    t.after(() => chat.close())
    await turn()
    assert.deepEqual([chat.state, asked], ['open', 1])
    await advance(t, () => asked > 1, 700_000)
    const after = (Date.now() - start) / 1000
    assert.ok(after > 300 && after < 600, `${after} s`)
    await advance(t, () => asked > 2, 100_000)
    assert.equal(asked, 2)
    assert.ok(socket)
  })
}

test('`expires` alone does not cause endless renewals if the clock is ahead', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout', 'Date'], now: 10_000_000 })
  let asked = 0
  class OlderSocket {
    constructor() { queueMicrotask(() => this.onopen()) }
    send(data) {
      const { type } = JSON.parse(data)
      this.onmessage({ data: type === 'ping' ? '{"type":"pong"}' : JSON.stringify({ type: 'authenticated', principal: 'ada', expires: 600 }) })
    }
    close() {}
  }
  const chat = connect('ws://localhost:1/', { WebSocket: OlderSocket, token: async () => `t${++asked}` })
  t.after(() => chat.close())
  await turn()
  await advance(t, () => false, 60_000)
  assert.deepEqual([chat.state, asked], ['open', 1])
})

test('a failed renewal is retried, and fails nothing else', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout', 'Date'], now: 10_000_000 })
  let auths = 0, socket
  class Fake {
    constructor() { socket = this; queueMicrotask(() => { this.onopen(); this.say({ type: 'hello', auth: true }) }) }
    say(frame) { this.onmessage({ data: JSON.stringify(frame) }) }
    send(data) {
      const { type, request } = JSON.parse(data)
      if (type === 'list') this.list = request
      if (type !== 'auth') return type === 'ping' && this.say({ type: 'pong' })
      if (++auths === 2) this.say({ type: 'error', code: 'auth_unavailable', message: 'Later.', retryable: true, request })
      else this.say({ type: 'authenticated', principal: 'ada', expires: 0, expires_in: 20, request })
    }
    close() {}
  }
  const chat = connect('ws://localhost:1/', { WebSocket: Fake, token: async () => 'token' })
  t.after(() => chat.close())
  const errors = []
  chat.on('error', ({ code }) => errors.push(code))
  await turn()
  await advance(t, () => false, 9_000)
  const list = chat.list()
  await advance(t, () => auths === 3, 60_000)
  assert.deepEqual([auths, errors], [3, ['auth_unavailable']])
  socket.say({ type: 'conversations', items: [], request: socket.list })
  assert.deepEqual(await list, { items: [], next: undefined })
})

for (const [why, Class, reason] of [
  ['there is no WebSocket', undefined, /no WebSocket/],
  ['the address is one that WebSocket refuses', class { constructor() { throw new DOMException('mixed content', 'SecurityError') } }, /mixed content/],
]) {
  test(`all calls fail at once if ${why}`, async (t) => {
    const global = Object.getOwnPropertyDescriptor(globalThis, 'WebSocket')
    t.after(() => { if (global) Object.defineProperty(globalThis, 'WebSocket', global) })
    delete globalThis.WebSocket
    const chat = connect('ws://localhost:1/', { WebSocket: Class, token: () => { assert.ok(Class, 'no token is requested without a WebSocket class'); return 't' } })
    const states = []
    chat.on('state', (state) => states.push(state))
    const early = [chat.prompt('Hi').done, chat.list(), chat.open('c'.repeat(16))]
    for (const call of early) await assert.rejects(call, { code: 'closed', message: reason })
    assert.equal(chat.state, 'closed')
    assert.match(states.at(-1).reason, reason)
    await assert.rejects(chat.prompt('Hi').done, { code: 'closed', message: reason })
    await assert.rejects(chat.list(), { code: 'closed', message: reason })
  })
}

test('a server that refuses every token is not called without pauses', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  let tried = 0
  class Busy {
    constructor() {
      tried++
      queueMicrotask(() => { this.onopen(); this.say({ type: 'hello', auth: true }) })
    }
    say(frame) { this.onmessage({ data: JSON.stringify(frame) }) }
    send(data) {
      if (JSON.parse(data).type !== 'auth') return
      queueMicrotask(() => {
        this.say({ type: 'error', code: 'auth_unavailable', message: 'Later.', retryable: true })
        this.onclose({ code: 1013, reason: 'auth_unavailable' })
      })
    }
    close() {}
  }
  const { random } = Math
  Math.random = () => 1
  t.after(() => { Math.random = random })
  const chat = connect('ws://localhost:1/', { WebSocket: Busy, token: 'token' })
  t.after(() => chat.close())
  await turn()
  await advance(t, () => false, 60_000)
  assert.ok(tried <= 9, `${tried} attempts in a minute`)
})

test('connections that end before any answer do not reset the back-off', async (t) => {
  const { random } = Math
  Math.random = () => 1
  t.after(() => { Math.random = random })
  const { chat, sockets } = connectFake(t, (socket, { type }) => {
    if (type === 'ping') socket.say({ type: 'pong' })
    else queueMicrotask(() => socket.onclose({ code: 1006, reason: '' })) // in the midst of the answer
  }, { firstPause: 500, longestPause: 15_000 })
  chat.list().catch(() => {})
  await advance(t, () => false, 60_000)
  assert.ok(sockets.length > 3 && sockets.length <= 10, `${sockets.length} attempts in a minute`)
})

test('a prompt waits while another node of the server does not answer', async (t) => {
  let refused = 0
  const { chat, sockets } = connectFake(t, (socket, frame) => {
    const { type, id, request } = frame
    pong(socket, frame)
    if (type !== 'prompt') return
    if (++refused < 4) socket.say({ type: 'error', code: 'unavailable', message: 'Later.', retryable: true, retry_after: 1, about: id, request })
    else {
      socket.say({ type: 'start', id, model: 'm', request })
      socket.say({ type: 'done', id, seq: 0, reason: 'end_turn', usage: {} })
    }
  })
  await turn()
  const reply = chat.prompt('Hi')
  await advance(t, () => reply.ended)
  assert.equal((await reply.done).reason, 'end_turn')
  assert.deepEqual(new Set(sockets[0].sent.filter(({ type }) => type === 'prompt').map(({ id }) => id)), new Set([reply.id]))
})

test('a resume that begins at another piece closes the chat', async (t) => {
  const { chat, sockets } = connectFake(t, (socket, { type, id, request }) => {
    if (type === 'resume') socket.say({ type: 'start', id, after: 3, request })
  })
  await turn()
  const reply = chat.resume('r'.repeat(16), { after: 2 })
  await assert.rejects(reply.done, { code: 'closed', message: /violates the protocol/ })
  assert.equal(sockets[0].sent.filter(({ type }) => type === 'resume').length, 1)
})

test('a repeated open waits for `retry_after`', async (t) => {
  let limits = 0
  const { chat, sockets } = connectFake(t, (socket, frame, number) => {
    const { type, request, conversation } = frame
    pong(socket, frame)
    if (type !== 'open') return
    if (number > 1 && ++limits < 4) socket.say({ type: 'error', code: 'limit', message: 'Later.', retryable: true, retry_after: 2, request })
    else socket.say({ type: 'history', conversation, messages: [], running: [], request })
  })
  const histories = [], errors = []
  chat.on('history', (history) => histories.push(history))
  chat.on('error', (error) => errors.push(error))
  await turn()
  await chat.open('c'.repeat(16))
  sockets[0].onclose({ code: 1006, reason: '' })
  await advance(t, () => histories.length > 1)
  assert.deepEqual([histories.length, limits, sockets.length, errors], [2, 4, 2, []])
})
