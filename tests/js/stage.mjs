// A server in another process (tests/support/stage.py) that a test controls, and clients that it can inspect.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { connect } from '../../wsserver/web/client.js'

const require = createRequire(new URL('../../.tools/node_modules/', import.meta.url))
export const { WebSocket } = require('ws')
const BOUND = 10_000 // milliseconds that any wait may take

/** Await a promise, but fail after a bound. */
export async function soon(promise, what = 'it') {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} did not happen`)), BOUND)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}

/** Wait for the next event whose detail (or target) passes a test. */
export function event(target, type, fits = () => true) {
  return soon(new Promise((resolve) => {
    const hear = (event) => {
      const told = event.detail ?? target
      if (!fits(told)) return
      target.removeEventListener(type, hear)
      resolve(told)
    }
    target.addEventListener(type, hear)
  }), `${type} ${fits}`)
}

export const until = (reply, fits) => (fits(reply) ? Promise.resolve(reply) : event(reply, 'change', fits))
export const says = (reply, text) => until(reply, (reply) => reply.text === text)
export const state = (chat, wanted) =>
  chat.state === wanted ? Promise.resolve() : event(chat, 'state', ({ state }) => state === wanted)
/** Wait for a change of state that may have happened already. */
export const passed = ({ chat, states }, fits) => (states.some(fits) ? Promise.resolve() : event(chat, 'state', fits))
export const rejects = (reply, expected) => assert.rejects(soon(reply.done, 'the end'), expected)
export const read = async (reply) => {
  let text = ''
  for await (const piece of reply) text += piece
  return text
}

export class Stage {
  #orders = 0
  #waiting = new Map()
  #process = spawn(process.env.PYTHON ?? 'python3', ['-m', 'tests.support.stage'], {
    cwd: new URL('../..', import.meta.url), stdio: ['pipe', 'pipe', 'inherit'],
  })

  #gone = new Promise((resolve) => this.#process.once('exit', resolve))

  constructor() {
    this.#gone.then(() => { for (const { reject } of this.#waiting.values()) reject(new Error('the stage ended')) })
    createInterface(this.#process.stdout).on('line', (line) => {
      const { n, answer, error } = JSON.parse(line)
      const { resolve, reject } = this.#waiting.get(n)
      this.#waiting.delete(n)
      if (error) reject(new Error(error))
      else resolve(answer)
    })
  }

  tell(what, options = {}) {
    const n = ++this.#orders
    const answer = new Promise((resolve, reject) => this.#waiting.set(n, { resolve, reject }))
    this.#process.stdin.write(`${JSON.stringify({ n, do: what, ...options })}\n`)
    return soon(answer, what)
  }

  release(gate) { return this.tell('release', { gate }) }
  asked(prompt) { return this.tell('asked', { prompt }) }
  closed(prompt) { return this.tell('closed', { prompt }) }

  /** End the process, or kill it with a signal. */
  async end(signal) {
    if (signal) this.#process.kill(signal)
    else this.#process.stdin.end()
    await soon(this.#gone, 'the end of the stage')
  }

  /** Start a server and a client: `chat`, `line('cut')`, and `sockets`, all sockets of the client. */
  async serve(t, { settings = {}, tokens, ...options } = {}) {
    const { server, url, port } = await this.tell('serve', { settings, tokens })
    const client = join(t, url, options)
    return {
      ...client, url, port, server,
      line: (how, given) => this.tell('line', { server, how, ...given }),
      close: () => this.tell('close', { server }),
      dismiss: (code, reason = '') => this.tell('dismiss', { server, code, reason }),
      connections: () => this.tell('connections', { server }),
    }
  }
}

export function join(t, url, options = {}) {
  const sockets = []
  class Spy extends (options.WebSocket ?? WebSocket) {
    sent = []
    constructor(...given) {
      super(...given)
      sockets.push(this)
    }
    send(data) {
      this.sent.push(JSON.parse(data))
      super.send(data)
    }
  }
  const chat = connect(url, { firstPause: 1, longestPause: 20, ...options, WebSocket: Spy })
  const frames = [], errors = [], states = []
  chat.on('state', (change) => states.push(change))
  chat.on('message', (frame) => frames.push(frame))
  chat.on('error', (error) => errors.push(error))
  t.after(() => {
    chat.close()
    for (const socket of sockets) socket.terminate?.() // or Node waits for the dead ones to answer
  })
  return { chat, sockets, frames, errors, states }
}

// The socket of an older server: it sends no `hello`, and refuses the key `request`.
export class OlderWebSocket extends WebSocket {
  set onmessage(hear) {
    super.onmessage = ({ data }) => {
      const { request, after, expires_in, ...frame } = JSON.parse(data)
      if (frame.type !== 'hello') hear({ data: JSON.stringify(frame) })
    }
  }
  send(data) {
    assert.equal(JSON.parse(data).request, undefined)
    super.send(data)
  }
}
