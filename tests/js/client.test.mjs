// The client against a real server, whose model does what the prompts say.
import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join as path } from 'node:path'
import { after, before, test } from 'node:test'
import { newId } from '../../wsserver/web/client.js'
import { event, join, passed, read, says, soon, Stage, state, until, WebSocket } from './stage.mjs'

let stage
before(() => { stage = new Stage() })
after(() => stage.end())

const rejects = (reply, expected) => assert.rejects(soon(reply.done, 'the end'), expected)

test('a prompt gets its text, piece by piece, and how it ended', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('think hm; say Hel; wait a; say lo; wait b; end max_tokens')
  const iterator = reply[Symbol.asyncIterator]()
  assert.deepEqual(await soon(iterator.next()), { value: 'Hel', done: false })
  const next = iterator.next()
  await stage.release('a')
  assert.deepEqual(await soon(next), { value: 'lo', done: false })
  assert.equal(reply.ended, false)
  await stage.release('b')
  assert.deepEqual(await soon(iterator.next()), { value: undefined, done: true })
  const { reason, by, usage, saved } = await reply.done
  assert.deepEqual([reason, by, saved], ['max_tokens', undefined, true])
  assert.equal(typeof usage.output_tokens, 'number')
  assert.deepEqual([reply.text, reply.thinking, reply.model, reply.seq], ['Hello', 'hm', 'troupe', 3])
  assert.match(reply.id, /^[0-9a-f]{32}$/)
  assert.equal(reply.conversation, chat.conversation)
  assert.equal(await read(reply), 'Hello') // from the beginning, as often as one likes
  assert.equal(chat.replies.size, 0)
})

test('prompts go on in one conversation, and messages touch none', async (t) => {
  const { chat } = await stage.serve(t)
  await chat.prompt('say one').done
  const second = chat.prompt('recall')
  await soon(second.done)
  assert.equal(second.text, 'say one | one')
  const apart = chat.prompt([{ role: 'user', content: 'x' }, { role: 'assistant', content: 'y' }, { role: 'user', content: 'recall' }])
  await soon(apart.done)
  assert.deepEqual([apart.text, apart.conversation], ['x | y', undefined])
  const elsewhere = chat.prompt('recall', { conversation: newId(), model: 'troupe', system: 'Be brief', maxTokens: 9, temperature: 1 })
  await soon(elsewhere.done)
  assert.equal(elsewhere.text, '')
  const broken = chat.prompt('say 🦆\ud83d', { conversation: newId() })
  await soon(broken.done)
  assert.equal(broken.text, '🦆\ufffd')
})

test('an error tells what it is, and the iteration throws it after the text', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('say half; fail overloaded 7')
  let text = ''
  await assert.rejects(async () => { for await (const piece of reply) text += piece }, { name: 'ReplyError', code: 'overloaded' })
  assert.equal(text, 'half')
  await rejects(reply, (error) => {
    assert.deepEqual([error.retryable, error.retryAfter], [true, 7])
    assert.ok(error.message && error.ref && error.usage)
    return true
  })
  await rejects(chat.prompt(' '), { code: 'invalid_frame', retryable: false })
})

test('a stop stops', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('say one; wait never')
  await says(reply, 'one')
  const result = await soon(reply.stop())
  assert.deepEqual([result.reason, result.by], ['stopped', 'client'])
  await stage.closed('say one; wait never')
  assert.equal(await read(reply), 'one')
  assert.equal(await reply.stop(), result) // harmless
  const early = chat.prompt('wait never 2')
  assert.equal((await soon(early.stop())).by, 'client')
})

test('a prompt under the id of one that runs is that one', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('say twice', { id: 'a-name-for-two-prompts' })
  assert.equal(chat.prompt('say twice', { id: reply.id }), reply)
  await soon(reply.done)
  assert.equal(reply.text, 'twice')
})

test('a prompt that is stopped before there was a connection is never sent', async (t) => {
  const { chat, sockets } = await stage.serve(t)
  const reply = chat.prompt('say nothing')
  assert.deepEqual(await soon(reply.stop()), { reason: 'stopped', by: 'client' })
  await soon(chat.prompt('say x').done)
  assert.equal(await stage.asked('say nothing'), 0)
  assert.ok(!sockets[0].sent.some(({ type }) => type === 'stop'))
})

test('several at once do not mix; one conversation is busy, queues, or is interrupted', async (t) => {
  const { chat } = await stage.serve(t)
  const one = chat.prompt('say a; wait q1; say b'), conversation = newId()
  const other = chat.prompt('say c; wait q2; say d', { conversation })
  await says(one, 'a')
  await says(other, 'c')
  await rejects(chat.prompt('say no', { conversation }), { code: 'busy', retryable: true })
  const queued = chat.prompt('say e', { conversation, onBusy: 'queue' })
  await until(queued, ({ queued }) => queued === 1)
  await stage.release('q2')
  await soon(queued.done)
  assert.equal(queued.queued, undefined)
  const instead = chat.prompt('say f', { onBusy: 'interrupt' })
  assert.equal((await soon(one.done)).by, 'replaced')
  await soon(instead.done)
  assert.deepEqual([one.text, other.text, queued.text, instead.text], ['a', 'cd', 'e', 'f'])
})

test('breaking off an iteration leaves the reply alone', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('say a; wait brk; say b')
  for await (const _ of reply) break
  await stage.release('brk')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
})

test('conversations are listed, opened, renamed and deleted', async (t) => {
  const { chat } = await stage.serve(t, { settings: { store: 'memory:' } })
  const first = chat.conversation
  await soon(chat.prompt('say one').done)
  const second = chat.prompt('say two', { conversation: newId() })
  await soon(second.done)
  assert.equal(await soon(chat.rename(first, 'Numbers')), undefined)
  const page = await soon(chat.list({ limit: 1 }))
  assert.deepEqual(page.items.map(({ id }) => id), [second.conversation])
  const rest = await soon(chat.list({ before: page.next }))
  assert.deepEqual([rest.items[0].title, rest.next], ['Numbers', undefined])
  const history = await soon(chat.open(first))
  assert.deepEqual(history.messages.map(({ role, content }) => [role, content]), [['user', 'say one'], ['assistant', 'one']])
  assert.deepEqual([history.title, history.replies], ['Numbers', []])
  await soon(chat.delete(first))
  assert.notEqual(chat.conversation, first)
  await assert.rejects(chat.open(first), { code: 'not_found' })
  await assert.rejects(chat.rename(first, 'x'), { code: 'not_found' })
  await assert.rejects(chat.delete(first), { code: 'not_found' })
})

test('a second tab sees what runs and what comes, and may stop it', async (t) => {
  const { chat, url } = await stage.serve(t)
  const first = chat.prompt('say a; wait tab; say b')
  await says(first, 'a')
  const { chat: tab } = join(t, url)
  const [told, { replies: [reply] }] = await Promise.all([event(tab, 'history'), tab.open(first.conversation)])
  assert.equal(told.replies[0], reply)
  await says(reply, 'a')
  assert.equal(reply.prompt, 'say a; wait tab; say b')
  await stage.release('tab')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
  const heard = event(tab, 'reply')
  const next = chat.prompt('say c; wait never 3')
  const followed = await heard
  assert.deepEqual([followed.id, followed.prompt], [next.id, 'say c; wait never 3'])
  await says(followed, 'c')
  followed.stop()
  assert.equal((await soon(next.done)).by, 'client')
  // Its own is its own, though the conversation is open here.
  const own = tab.prompt('say d; wait own; say e')
  await says(own, 'd')
  const again = await soon(tab.open(first.conversation))
  assert.deepEqual(again.replies, [own])
  await stage.release('own')
  await soon(own.done)
  assert.equal(own.text, 'de')
})

// Calls that the server refuses.

const cyclic = []
cyclic.push(cyclic)
const C = 'conversation-of-the-tests', ODD = {
  'undefined': undefined, 'null': null, 'a number': 42, 'not a number': NaN, 'true': true, 'a large number': 10n, 'nothing': '', 'blank': ' ',
  'short': '42', 'with a slash': 'team/42/of-the-company', 'long': 'x'.repeat(201), 'longer': 'x'.repeat(1_000), 'half of a character': '\ud83d'.repeat(20),
  'a list': ['x'], 'an object': { id: C }, 'a cycle': cyclic, 'a function': () => C, 'a symbol': Symbol('x'),
  'deep': JSON.parse('['.repeat(2_000) + ']'.repeat(2_000)),
}
const CALLS = {
  'the prompt': (chat, odd) => chat.prompt(odd).done,
  'its id': (chat, odd) => chat.prompt('say hi', { id: odd }).done,
  'its conversation': (chat, odd) => chat.prompt('say hi', { conversation: odd }).done,
  'its onBusy': (chat, odd) => chat.prompt('say hi', { onBusy: odd }).done,
  'its retryOf': (chat, odd) => chat.prompt('say hi', { retryOf: odd }).done,
  'its maxTokens': (chat, odd) => chat.prompt('say hi', { maxTokens: odd }).done,
  'its temperature': (chat, odd) => chat.prompt('say hi', { temperature: odd }).done,
  'its model': (chat, odd) => chat.prompt('say hi', { model: odd }).done,
  'its system': (chat, odd) => chat.prompt('say hi', { system: odd }).done,
  'its options': (chat, odd) => chat.prompt('say hi', odd).done,
  'a message': (chat, odd) => chat.prompt([odd]).done,
  'the content of a message': (chat, odd) => chat.prompt([{ role: 'user', content: odd }]).done,
  'the role of a message': (chat, odd) => chat.prompt([{ role: odd, content: 'say hi' }]).done,
  'what is resumed': (chat, odd) => chat.resume(odd).done,
  'where it is resumed': (chat, odd) => chat.resume(newId(), { after: odd }).done,
  'what is opened': (chat, odd) => chat.open(odd),
  'where a history ends': (chat, odd) => chat.open(C, { before: odd }),
  'how many are listed': (chat, odd) => chat.list({ limit: odd }),
  'where a list begins': (chat, odd) => chat.list({ before: odd }),
  'what is renamed': (chat, odd) => chat.rename(odd, 'x'),
  'a title': (chat, odd) => chat.rename(C, odd),
  'what is deleted': (chat, odd) => chat.delete(odd),
}
const RATES = { frame_rate: 1e6, frame_burst: 1e6, bad_frames: 1e6, prompts_per_minute: 1e6, requests: 1e6 }

for (const [what, call] of Object.entries(CALLS)) {
  test(`whatever is given for ${what}, that call settles and no other is hit`, async (t) => {
    const { frame_rate, frame_burst, bad_frames, prompts_per_minute } = RATES
    const { chat, errors } = await stage.serve(t, { settings: { store: 'memory:', frame_rate, frame_burst, bad_frames, prompts_per_minute } })
    await soon(chat.prompt('say hi', { conversation: C }).done)
    const other = chat.prompt(`say one; wait odd ${what}; say two`, { conversation: newId() })
    await says(other, 'one')
    for (const [name, odd] of Object.entries(ODD)) {
      const before = chat.list()
      const settled = new Promise((resolve) => { resolve(call(chat, odd)) }).then(() => 'resolved', (error) => error)
      const after = chat.list()
      const outcome = await soon(settled, name)
      assert.ok(outcome === 'resolved' || ['ReplyError', 'TypeError'].includes(outcome.name), `${name}: ${outcome}`)
      assert.ok(!['no_answer', 'closed'].includes(outcome.code), `${name}: ${outcome.code}`)
      assert.ok((await soon(before)).items && (await soon(after)).items, name)
    }
    await stage.release(`odd ${what}`)
    await soon(other.done)
    assert.deepEqual([other.text, chat.state, errors], ['onetwo', 'open', []])
    assert.equal((await soon(chat.prompt('say after', { onBusy: 'interrupt' }).done)).reason, 'end_turn') // whose conversation is a good one
  })
}

test('a call that is refused is told why', async (t) => {
  const { chat } = await stage.serve(t)
  await soon(chat.prompt('say hi', { conversation: C }).done)
  await rejects(chat.prompt('Hi', { id: '42' }), { code: 'invalid_frame', message: /^id: / })
  await rejects(chat.resume('42'), { code: 'invalid_frame', message: /^id: / })
  await assert.rejects(chat.open('team/42'), { code: 'invalid_frame', message: /^conversation: / })
  await assert.rejects(chat.open(C, { before: 0 }), { code: 'invalid_frame', message: /^before: / })
  await assert.rejects(chat.rename(C, 'x'.repeat(201)), { code: 'invalid_frame', message: /^title: / })
  await rejects(chat.prompt([{ role: 'user', content: cyclic }]), { code: 'invalid_frame', message: /circular/ })
  assert.notEqual(chat.conversation, 'team/42')
})

test('over the frame rate the frames that are too many are refused, and no others', async (t) => {
  const { chat, errors } = await stage.serve(t, { settings: { frame_burst: 8, frame_rate: 0.01, bad_frames: 1000 } })
  await state(chat, 'open')
  const title = 'x'.repeat(190), outcomes = []
  for (let n = 0; n < 20; n++) {
    const call = n % 2 ? chat.rename(newId(), title + 'y'.repeat(n % 10)) : chat.list()
    outcomes.push(call.then(() => 'list', ({ code }) => code))
  }
  const codes = await soon(Promise.all(outcomes))
  const accepted = codes.indexOf('limit')
  assert.ok(accepted > 4 && accepted <= 8)
  assert.deepEqual(codes.slice(0, accepted), codes.slice(0, accepted).map((_, n) => (n % 2 ? 'not_found' : 'list')))
  assert.ok(codes.slice(accepted).every((code) => code === 'limit'))
  assert.deepEqual(errors, [])
})

// A server of before knows no names: it refuses frames that have one, and says no `hello`.
class Former extends WebSocket {
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

test('a server that knows no names is served as well', async (t) => {
  const { chat, line, port, errors } = await stage.serve(t, { WebSocket: Former, timeout: 300, settings: { store: 'memory:' } })
  const { conversation } = chat
  const reply = chat.prompt('say a; wait former; say b')
  await says(reply, 'a')
  const [first, second] = await soon(Promise.all([chat.list(), chat.list({ limit: 1 })]))
  assert.ok(first.items && second.items)
  assert.deepEqual((await soon(chat.open(conversation))).replies, [reply])
  await assert.rejects(soon(chat.rename(newId(), 'x')), { code: 'not_found' })
  await rejects(chat.prompt('Hi', { conversation: C, temperature: 9 }), { code: 'invalid_frame' })
  await rejects(chat.prompt('Hi', { id: '42', conversation: C }), { code: 'no_answer' }) // the refusal names nobody
  await line('cut')
  await stage.release('former')
  await line('mend')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
  const { chat: speaker } = join(t, `ws://127.0.0.1:${port}/`)
  const running = speaker.prompt('say a; wait never former', { conversation })
  const seen = await event(chat, 'reply')
  await says(seen, 'a')
  assert.equal((await soon(seen.stop())).by, 'client')
  await soon(running.done)
  await soon(chat.delete(conversation))
  assert.deepEqual(errors.map(({ code }) => code), ['invalid_frame'])
})

test('each answer has the name of what it answers', async (t) => {
  const { chat, frames } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never named')
  await says(reply, 'a')
  assert.equal((await soon(reply.stop())).by, 'client')
  await soon(chat.list())
  assert.ok(frames.some(({ type, ids }) => type === 'stopped' && ids[0] === reply.id))
  assert.ok(frames.filter(({ type }) => ['start', 'stopped'].includes(type)).every(({ request }) => request))
  assert.equal(frames[0].type, 'hello')
  assert.equal(chat.limits.message_size, frames[0].limits.message_size)
})

test('a retry takes the place of what failed', async (t) => {
  const { chat, url } = await stage.serve(t)
  await soon(chat.prompt('say first').done)
  const failed = chat.prompt('say half; fail overloaded')
  await rejects(failed, { code: 'overloaded' })
  const { chat: tab } = join(t, url)
  await soon(tab.open(chat.conversation))
  const heard = event(tab, 'reply')
  const again = chat.prompt('recall', { retryOf: failed.id })
  await soon(again.done)
  assert.equal(again.text, 'say first | first')
  assert.equal(again.retryOf, failed.id)
  assert.equal((await heard).retryOf, failed.id)
  const { messages } = await soon(tab.open(chat.conversation))
  assert.deepEqual(messages.map(({ content }) => content), ['say first', 'first', 'recall', 'say first | first'])
  await rejects(chat.prompt('recall', { retryOf: failed.id }), { code: 'not_last' })
})

test('an open that fails changes nothing, and another one leaves the first', async (t) => {
  const { chat, port, sockets } = await stage.serve(t)
  const { chat: speaker } = join(t, `ws://127.0.0.1:${port}/`)
  const one = newId(), two = newId()
  await soon(speaker.prompt('say one', { conversation: one }).done)
  await soon(speaker.prompt('say two', { conversation: two }).done)
  await soon(chat.open(one))
  await assert.rejects(chat.open(newId()), { code: 'not_found' })
  assert.equal(chat.conversation, one)
  const heard = event(chat, 'reply')
  const running = speaker.prompt('say a; wait leave; say b', { conversation: one })
  const seen = await heard
  await says(seen, 'a')
  await soon(chat.open(two))
  await soon(chat.list()) // after whose answer the first is closed
  assert.deepEqual(sockets[0].sent.filter(({ type }) => type === 'close').map(({ conversation }) => conversation), [one])
  await stage.release('leave')
  await soon(seen.done)
  assert.equal(seen.text, 'ab')
  await soon(running.done)
  const frames = []
  chat.on('message', (frame) => frames.push(frame))
  await soon(speaker.prompt('say c', { conversation: one }).done)
  await soon(chat.list())
  assert.deepEqual(frames.map(({ type }) => type).filter((type) => type !== 'pong'), ['conversations'])
})

test('more conversations can be opened one after the other than at once', async (t) => {
  const { chat } = await stage.serve(t, { settings: { frame_burst: 1000, prompts_per_minute: 1000 } })
  for (let n = 0; n < 70; n++) {
    const conversation = newId()
    await soon(chat.prompt('say x', { conversation }).done)
    await soon(chat.open(conversation))
  }
})

test('another socket is told of a new title', async (t) => {
  const { chat, url } = await stage.serve(t)
  await soon(chat.prompt('say x').done)
  const { chat: tab } = join(t, url)
  await soon(tab.open(chat.conversation))
  const told = event(tab, 'renamed')
  await soon(chat.rename(chat.conversation, 'News'))
  assert.deepEqual(await told, { conversation: chat.conversation, title: 'News' })
})

// Lost connections.

test('a line that lets little through in each connection is enough', async (t) => {
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
            gone = true // what else has come is lost as well
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

test('a reply goes on after each of many losses', async (t) => {
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

test('a second tab goes on as well, and is told what it has missed', async (t) => {
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

test('a conversation that others delete meanwhile is not asked for again and again', async (t) => {
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

test('a second tab goes on with what still runs without doubling it', async (t) => {
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

test('what is asked again after a loss is asked no faster than the server allows', async (t) => {
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

test('what is asked without a connection is sent later, once', async (t) => {
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

test('a prompt whose fate is unknown is sent again and paid for once', async (t) => {
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

test('a stop without a connection holds here at once and there later', async (t) => {
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

test('a stop whose answer is lost ends the reply as well', async (t) => {
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

test('another client goes on with a reply, from anywhere in it', async (t) => {
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
  test(`a server that dies with ${lost ? 'the last text' : 'nothing'} unsaved is not the end`, async (t) => {
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

test('a restart is waited for, and prompts with it', async (t) => {
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

test('a connection that is dead is noticed', async (t) => {
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

test('the WebSocket that Node has itself will do', { skip: !globalThis.WebSocket }, async (t) => {
  const { chat, line } = await stage.serve(t, { WebSocket: globalThis.WebSocket })
  const reply = chat.prompt('say a; wait undici; say b')
  await says(reply, 'a')
  await line('cut')
  await stage.release('undici')
  await line('mend')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
})

// Who the client is.

test('it says who it is first, and a token that is not good is not tried again', async (t) => {
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

test('a function is asked for each token, and again before it expires', async (t) => {
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

test('a token that has expired is replaced where there is another', async (t) => {
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

test('a token for somebody else begins a new connection', async (t) => {
  const { chat, sockets } = await stage.serve(t, { tokens: { one: ['ada', null], two: ['bob', null] }, token: 'one' })
  await soon(chat.prompt('say a').done)
  chat.setToken('two')
  await state(chat, 'waiting')
  await soon(chat.prompt('say b').done)
  assert.equal(sockets.length, 2)
})

test('a token that cannot be had is asked for again', async (t) => {
  let asked = 0
  const token = async () => { if (++asked < 3) throw new Error('offline'); return 'late' }
  const { chat } = await stage.serve(t, { tokens: { late: ['ada', null] }, token })
  await soon(chat.prompt('say a').done)
  assert.equal(asked, 3)
})

// Close codes.

test('an idle connection is closed, and made again when something is asked', async (t) => {
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
  test(`after ${code} it does not come back`, async (t) => {
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
  test(`after ${code} it comes back`, async (t) => {
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

for (const Class of [WebSocket, Former]) {
  test(`a message that is too long fails alone, with a ${Class.name}`, async (t) => {
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
    if (Class !== Former) assert.equal(sockets.length, 1) // it is told before it is sent
  })
}

test('what is closed is closed', async (t) => {
  const { chat, sockets } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never 8')
  await says(reply, 'a')
  chat.close()
  assert.equal(chat.state, 'closed')
  await rejects(reply, { code: 'closed' })
  await rejects(chat.resume(reply.id), { code: 'closed' })
  assert.equal(sockets.length, 1)
})

test('frames of unknown types are passed on and change nothing', async (t) => {
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
]) {
  test(`what is no server of the protocol is told, and ends nothing but the chat: ${said}`, async (t) => {
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
    await rejects(reply, { code: 'closed', message: /breaks the protocol/ })
    await list
    assert.deepEqual([reply.text, chat.state], ['', 'closed'])
  })
}
