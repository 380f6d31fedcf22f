// Lost connections and restarted servers, of the JavaScript client.
import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join as path } from 'node:path'
import { after, before, test } from 'node:test'
import { newId } from '../../wsserver/web/client.js'
import { event, join, read, rejects, says, soon, Stage, state, WebSocket } from './stage.mjs'

let stage
before(() => { stage = new Stage() })
after(() => stage.end())

// Lost connections.

test('a reply arrives over connections that each carry a few bytes', async (t) => {
  const { chat, line, port } = await stage.serve(t)
  const { chat: speaker } = join(t, `ws://127.0.0.1:${port}/`)
  const said = Array.from({ length: 8_000 }, (_, n) => `${n} `).join('')
  const running = speaker.prompt('count 8000; wait narrow')
  await says(running, said)
  await line('narrow', { width: 6_000 })
  await line('reset')
  const reply = chat.resume(running.id, { conversation: running.conversation })
  await says(reply, said)
  await stage.release('narrow')
  await soon(reply.done)
  assert.ok(chat.state)
})


const SCRIPT = 'think h; say one; say  two; think m; say  three'
const LAST = 7 // frames: pong, start, five pieces or fewer merged ones, done

test('a history arrives over connections that each carry a few bytes', async (t) => {
  const { chat, line } = await stage.serve(t)
  const said = Array.from({ length: 1_000 }, (_, n) => `${n} `).join('')
  for (let n = 0; n < 6; n++) assert.equal((await soon(chat.prompt('count 1000').done)).reason, 'end_turn')
  await line('narrow', { width: 12_000 })
  await line('reset')
  const messages = []
  let before
  do {
    const page = await soon(chat.open(chat.conversation, { before: before ?? 2 ** 53 - 1 }))
    messages.unshift(...page.messages)
    before = page.before
  } while (before !== undefined)
  assert.deepEqual(messages.filter(({ role }) => role === 'assistant').map(({ content }) => content), Array(6).fill(said))
})

test('an older server gets `open` without `size`', async (t) => {
  const sizes = []
  class Broken extends EventTarget {
    constructor() {
      super()
      setTimeout(() => { this.onopen(); this.onmessage({ data: '{"type":"hello"}' }) })
    }
    send(data) {
      const { type, conversation, size, request } = JSON.parse(data)
      if (type !== 'open') return
      sizes.push(size)
      if (sizes.length < 3) setTimeout(() => this.onclose({ code: 1006, reason: '' }))
      const answer = size ? { type: 'error', code: 'invalid_frame', message: 'size: unknown.', retryable: false, request }
        : { type: 'history', conversation, title: 'T', messages: [], running: [], request }
      if (sizes.length >= 3) setTimeout(() => this.onmessage({ data: JSON.stringify(answer) }))
    }
    close() {}
  }
  const { chat } = join(t, 'ws://localhost', { WebSocket: Broken })
  assert.deepEqual((await soon(chat.open(newId()))).messages, [])
  assert.deepEqual(sizes, [undefined, undefined, 32768, undefined])
})

for (const how of ['before', 'after']) {
  for (let count = 1; count <= LAST; count++) {
    test(`nothing is lost nor doubled if the connection is lost ${how} frame ${count}`, async (t) => {
      let left = count
      class Fragile extends WebSocket {
        set onmessage(hear) {
          let gone = false
          super.onmessage = (event) => {
            const last = --left === 0
            if (!gone && !(last && how === 'before')) hear(event)
            if (!last) return
            gone = true // later data is lost as well
            this.terminate()
          }
        }
      }
      const { chat, errors } = await stage.serve(t, { WebSocket: Fragile })
      const prompt = `${SCRIPT}; say  ${how}${count}`
      const reply = chat.prompt(prompt)
      assert.equal(await soon(read(reply)), `one two three ${how}${count}`)
      assert.equal(reply.thinking, 'hm')
      assert.equal((await reply.done).reason, 'end_turn')
      assert.equal(await stage.asked(prompt), 1)
      assert.deepEqual(errors, [])
    })
  }
}

test('a reply continues after many lost connections', async (t) => {
  const { chat, line } = await stage.serve(t)
  const reply = chat.prompt('say 0; wait l0; say 1; wait l1; say 2; wait l2; say 3')
  const other = chat.prompt('think t; wait l1; say x', { conversation: newId() })
  for (let n = 0; n < 3; n++) {
    await says(reply, '0123'.slice(0, n + 1))
    await line('cut')
    await stage.release(`l${n}`)
    await line('mend')
  }
  await soon(reply.done)
  await soon(other.done)
  assert.deepEqual([reply.text, other.text, other.thinking], ['0123', 'x', 't'])
})

test('a second tab continues as well, and gets the turns that it missed', async (t) => {
  const { chat, port, line } = await stage.serve(t)
  await line('cut')
  const { chat: speaker } = join(t, `http://127.0.0.1:${port}/`) // by another way
  await soon(speaker.prompt('say first').done)
  await line('mend')
  await soon(chat.open(speaker.conversation))
  const running = speaker.prompt('say a; wait tabs; say b')
  const seen = await event(chat, 'reply')
  await says(seen, 'a')
  await line('cut')
  const told = event(chat, 'history')
  await stage.release('tabs')
  await soon(running.done)
  await soon(speaker.prompt('say meanwhile').done)
  await line('mend')
  const { messages, replies } = await told
  assert.equal(messages.at(-1).content, 'meanwhile')
  await soon(seen.done)
  assert.equal(seen.text, 'ab')
  assert.deepEqual(replies, [])
})

test('a conversation deleted while offline is not opened again', async (t) => {
  const { chat, errors, sockets, port, line } = await stage.serve(t)
  const { conversation } = chat
  await soon(chat.prompt('say first').done)
  await soon(chat.open(conversation))
  await line('cut')
  const { chat: other } = join(t, `http://127.0.0.1:${port}/`) // by another way
  await soon(other.delete(conversation))
  const told = event(chat, 'error')
  await line('mend')
  assert.equal((await told).code, 'not_found')
  assert.notEqual(chat.conversation, conversation)
  await line('cut')
  await state(chat, 'waiting')
  await line('mend')
  await soon(chat.list())
  assert.deepEqual(sockets.at(-1).sent.filter(({ type }) => type === 'open'), [])
  assert.equal(errors.length, 1)
})

test('a second tab continues a running reply without doubled text', async (t) => {
  const { chat, port, line } = await stage.serve(t)
  const { chat: speaker } = join(t, `ws://127.0.0.1:${port}/`)
  const running = speaker.prompt('say a; wait still1; say b; wait still2; say c')
  await says(running, 'a')
  const { replies: [seen] } = await soon(chat.open(speaker.conversation))
  await says(seen, 'a')
  await line('cut')
  await stage.release('still1')
  await says(running, 'ab')
  await line('mend')
  await says(seen, 'ab')
  await stage.release('still2')
  await soon(seen.done)
  assert.equal(seen.text, 'abc')
})

test('requests after a reconnect respect the frame rate', async (t) => {
  const { chat, line } = await stage.serve(t, {
    settings: { frame_burst: 4, frame_rate: 50, generations_per_socket: 10 },
  })
  const ask = (n) => chat.prompt(`say ${n}; wait rate; say !`, { conversation: newId() })
  const replies = [ask(0), ask(1), ask(2)]
  await Promise.all(replies.map((reply, n) => says(reply, `${n}`)))
  await line('cut')
  await state(chat, 'waiting')
  replies.push(ask(3), ask(4), ask(5))
  await line('mend')
  await Promise.all(replies.map((reply, n) => says(reply, `${n}`)))
  await stage.release('rate')
  await Promise.all(replies.map((reply, n) => says(reply, `${n}!`)))
})

test('a prompt without a connection is sent once, on the next one', async (t) => {
  const { chat, line } = await stage.serve(t)
  await state(chat, 'open')
  await line('cut')
  await state(chat, 'waiting')
  const reply = chat.prompt('say later'), listed = chat.list()
  await line('mend')
  await soon(reply.done)
  assert.equal(await stage.asked('say later'), 1)
  assert.ok((await soon(listed)).items)
})

test('a prompt that may have arrived is sent again and runs once', async (t) => {
  const { chat, line, sockets } = await stage.serve(t)
  await state(chat, 'open')
  await line('deafen')
  const reply = chat.prompt('say once; wait deaf; say  more')
  const deleted = chat.delete(newId())
  await soon((async () => { while (!await stage.asked(reply.prompt)); })())
  await line('cut')
  await line('mend')
  await says(reply, 'once')
  await stage.release('deaf')
  await soon(reply.done)
  assert.deepEqual([reply.text, await stage.asked(reply.prompt)], ['once more', 1])
  const prompts = sockets.flatMap(({ sent }) => sent).filter(({ type }) => type === 'prompt')
    .map(({ request: _, ...prompt }) => prompt)
  assert.equal(prompts.length, 2)
  assert.deepEqual(prompts[0], prompts[1])
  await soon(deleted) // it is not there after the second attempt, and may have been before
})

test('a stop without a connection ends the reply here at once and at the server later', async (t) => {
  const { chat, line, errors } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never 4')
  await says(reply, 'a')
  await soon(chat.open(reply.conversation))
  await line('cut')
  await state(chat, 'waiting')
  const seen = []
  chat.on('reply', (other) => seen.push(other))
  assert.deepEqual(await soon(reply.stop()), { reason: 'stopped', by: 'client' })
  await line('mend')
  await stage.closed(reply.prompt)
  await soon(chat.prompt('say b', { onBusy: 'queue' }).done)
  assert.deepEqual([seen, errors], [[], []])
})

test('a stop whose answer is lost ends the reply', async (t) => {
  const { chat, line } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never 5')
  await says(reply, 'a')
  await line('deafen')
  reply.stop()
  await stage.closed(reply.prompt)
  await line('cut')
  assert.equal((await soon(reply.done)).by, 'client')
  await line('mend')
  await soon(chat.prompt('say b').done)
})

test('another client resumes a reply after any piece', async (t) => {
  const { chat, url } = await stage.serve(t)
  const reply = chat.prompt('say a; say b; wait c; say c')
  await says(reply, 'ab')
  const { chat: other } = join(t, url)
  const whole = other.resume(reply.id), { chat: third } = join(t, url)
  const rest = third.resume(reply.id, { after: 1 }) // as of a page that is gone
  await says(rest, 'b')
  await soon(third.open(reply.conversation))
  await stage.release('c')
  await soon(Promise.all([whole.done, rest.done]))
  assert.deepEqual([whole.text, rest.text], ['abc', 'bc'])
  await rejects(other.resume(newId()), { code: 'not_found' })
})

for (const lost of ['', ' more']) {
  test(`after a crash with ${lost ? 'the last text' : 'nothing'} unsaved the text is what the server has`, async (t) => {
    const folder = await mkdtemp(path(tmpdir(), 'stage-'))
    t.after(() => rm(folder, { recursive: true }))
    const settings = { store: `sqlite:///${folder}/s`, save_interval: 0.01 }
    const doomed = new Stage(), next = new Stage()
    t.after(() => next.end())
    const { server, port } = await doomed.tell('serve', { settings })
    const { chat, errors } = join(t, `ws://127.0.0.1:${port}/`)
    const reply = chat.prompt('say half; wait jam; say  more; wait never 6')
    const reading = assert.rejects(read(reply), { code: 'interrupted' })
    await says(reply, 'half')
    await doomed.tell('saved', { server, reply: reply.id, pieces: 1 })
    if (lost) {
      await doomed.tell('jam', { server })
      await doomed.release('jam')
      await says(reply, `half${lost}`)
    }
    await doomed.end('SIGKILL')
    await next.tell('serve', { settings: { ...settings, port } })
    await rejects(reply, { code: 'interrupted', retryable: true })
    await soon(reading)
    assert.equal(reply.text, 'half') // what the server has
    const { messages } = await soon(chat.open(reply.conversation))
    assert.deepEqual(messages.slice(1).map(({ content, partial }) => [content, partial]), [['half', 'interrupted']])
    await soon(chat.prompt('say again').done)
    assert.deepEqual(errors, [])
  })
}

test('a prompt during a restart is sent to the next server', async (t) => {
  const { chat, port, url, server } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never 7')
  await says(reply, 'a')
  await stage.tell('close', { server })
  assert.equal((await soon(reply.done)).by, 'shutdown')
  const later = chat.prompt('say b')
  const { server: __ } = await stage.tell('serve', { settings: { port } })
  assert.ok(url)
  await soon(later.done)
})

test('a dead connection is replaced', async (t) => {
  const { chat, line, sockets } = await stage.serve(t, { heartbeat: 50 })
  const reply = chat.prompt('say a; wait dead; say b')
  await says(reply, 'a')
  await line('deafen')
  await state(chat, 'waiting')
  await line('cut')
  await line('mend')
  await stage.release('dead')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
  assert.ok(sockets.length > 1)
})

test('the WebSocket class of Node works', { skip: !globalThis.WebSocket }, async (t) => {
  const { chat, line } = await stage.serve(t, { WebSocket: globalThis.WebSocket })
  const reply = chat.prompt('say a; wait undici; say b')
  await says(reply, 'a')
  await line('cut')
  await stage.release('undici')
  await line('mend')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
})
