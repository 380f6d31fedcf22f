// What the client does with time, without any.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { connect } from '../../wsserver/web/client.js'

test('pauses are random below a bound that doubles up to a limit', async (t) => {
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

test('a page that slept gives its connection another chance', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  let clock = 0
  t.mock.method(Date, 'now', () => clock)
  let socket
  class Fake {
    constructor() { socket = this; this.pings = 0 }
    send() { this.pings++ }
    close() {}
    answer() { this.onmessage({ data: '{"type":"pong"}' }) }
  }
  const begin = async () => {
    const chat = connect('ws://localhost:1/', { WebSocket: Fake })
    await Promise.resolve()
    await Promise.resolve()
    socket.onopen()
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
