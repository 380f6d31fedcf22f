// A stage (tests/support/stage.py) in the hands of a test, and clients that a test can look into.
import { spawn } from 'node:child_process'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { connect } from '../../wsserver/web/client.js'

const require = createRequire(new URL('../../.tools/node_modules/', import.meta.url))
export const { WebSocket } = require('ws')
const BOUND = 10_000 // milliseconds that any wait may take

/** Give what a promise gives, but fail if that takes too long. */
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

/** Wait for the next event whose detail (or target) fits. */
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
/** Wait for a change of state that may have come already. */
export const passed = ({ chat, states }, fits) => (states.some(fits) ? Promise.resolve() : event(chat, 'state', fits))
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

  /** End it, gently or as a machine does that fails. */
  async end(signal) {
    if (signal) this.#process.kill(signal)
    else this.#process.stdin.end()
    await soon(this.#gone, 'the end of the stage')
  }

  /** A server with a client: `chat`, `line('cut')`, and `sockets`, all that the client has made. */
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
