// Fake sockets and fake time, for tests without a server.
import { connect } from '../../wsserver/web/client.js'

/** Make a client with fake sockets and timers. Each socket records the frames and calls `answer`. */
export function connectFake(t, answer = () => {}, options = { firstPause: 1, longestPause: 1 }, make = connect) {
  t.mock.timers.enable({ apis: ['setTimeout', 'Date'] })
  const sockets = []
  class Fake {
    sent = []
    greeted = false // no server answers before its `hello`
    terminated = false
    constructor() {
      sockets.push(this)
      queueMicrotask(() => {
        this.onopen()
        this.greeted = true
        this.say({ type: 'hello' })
      })
    }
    say(frame) { this.onmessage({ data: JSON.stringify(frame) }) }
    send(data) {
      const frame = JSON.parse(data)
      this.sent.push(frame)
      if (this.greeted) answer(this, frame, sockets.length)
    }
    close() {}
    terminate() { this.terminated = true }
  }
  const chat = make('ws://localhost:1/', { WebSocket: Fake, ...options })
  t.after(() => chat.close())
  return { chat, sockets }
}

/** Let pending events run. */
export const turn = () => new Promise((resolve) => { setImmediate(resolve) })

/** Advance the timers until a condition holds; return the milliseconds. */
export async function advance(t, so, most = 120_000) {
  let passed = 0
  for (; !so() && passed < most; passed += 100) {
    t.mock.timers.tick(100)
    await turn()
  }
  return passed
}

export const pong = (socket, { type }) => { if (type === 'ping') socket.say({ type: 'pong' }) }
