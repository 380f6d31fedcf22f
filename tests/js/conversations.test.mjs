// Conversations and refused calls of the JavaScript client, against a real server.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { newId } from '../../wsserver/web/client.js'
import { event, join, OlderWebSocket, rejects, says, soon, Stage, state, WebSocket } from './stage.mjs'

let stage
before(() => { stage = new Stage() })
after(() => stage.end())

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

test('a second tab sees running and later replies, and can stop them', async (t) => {
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
  test(`any value as ${what}: the call settles, and other calls are not affected`, async (t) => {
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

test('a refused call rejects with the server\'s error', async (t) => {
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

test('frames over the rate are refused, and no others', async (t) => {
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

test('an older server without `request` keys works', async (t) => {
  const { chat, line, port, errors } = await stage.serve(t, { WebSocket: OlderWebSocket, timeout: 300, settings: { store: 'memory:' } })
  const { conversation } = chat
  const reply = chat.prompt('say a; wait former; say b')
  await says(reply, 'a')
  const [first, second] = await soon(Promise.all([chat.list(), chat.list({ limit: 1 })]))
  assert.ok(first.items && second.items)
  assert.deepEqual((await soon(chat.open(conversation))).replies, [reply])
  await assert.rejects(soon(chat.rename(newId(), 'x')), { code: 'not_found' })
  await rejects(chat.prompt('Hi', { conversation: C, temperature: 9 }), { code: 'invalid_frame' })
  await rejects(chat.prompt('Hi', { id: '42', conversation: C }), { code: 'no_answer' }) // the refusal names no frame
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

test('each answer has the `request` of its frame', async (t) => {
  const { chat, frames } = await stage.serve(t)
  const reply = chat.prompt('say a; wait never named')
  await says(reply, 'a')
  assert.equal((await soon(reply.stop())).by, 'client')
  await soon(chat.list())
  assert.ok(frames.some(({ type, ids }) => type === 'stopped' && ids[0] === reply.id))
  assert.ok(frames.filter(({ type }) => ['start', 'stopped'].includes(type)).every(({ request }) => request))
  assert.equal(frames[0].type, 'hello')
  assert.equal(chat.limits.message_size, frames[0].limits.message_size)
  assert.deepEqual(chat.models, frames[0].models)
})

test('a retry replaces the failed turn', async (t) => {
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

test('a failed open changes nothing, and the next one closes the first', async (t) => {
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

test('more conversations can be opened in turn than at once', async (t) => {
  const { chat } = await stage.serve(t, { settings: { frame_burst: 1000, prompts_per_minute: 1000 } })
  for (let n = 0; n < 70; n++) {
    const conversation = newId()
    await soon(chat.prompt('say x', { conversation }).done)
    await soon(chat.open(conversation))
  }
})

test('another socket gets the new title', async (t) => {
  const { chat, url } = await stage.serve(t)
  await soon(chat.prompt('say x').done)
  const { chat: tab } = join(t, url)
  await soon(tab.open(chat.conversation))
  const told = event(tab, 'renamed')
  await soon(chat.rename(chat.conversation, 'News'))
  assert.deepEqual(await told, { conversation: chat.conversation, title: 'News' })
})

test('a history of the server has thinking, model, usage and times', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('think Hm.; say Hello')
  const { usage } = await soon(reply.done)
  const { messages: [asked, said] } = await soon(chat.open(chat.conversation))
  assert.deepEqual([said.content, said.thinking, said.model], ['Hello', 'Hm.', 'troupe'])
  assert.deepEqual([said.usage, said.blocks.map(({ type }) => type)], [usage, ['thinking', 'text']])
  assert.ok(asked.began <= said.ended)
})

test('a prompt may be content blocks', async (t) => {
  const { chat } = await stage.serve(t)
  const image = { type: 'image', source: { type: 'url', url: 'https://example.com/duck.png' } }
  const prompt = [{ type: 'text', text: 'say A duck' }, image]
  const reply = chat.prompt(prompt)
  await soon(reply.done)
  const { messages: [asked] } = await soon(chat.open(chat.conversation))
  assert.deepEqual([asked.content, asked.blocks], ['say A duck', prompt])
  const apart = chat.prompt([{ role: 'user', content: prompt }])
  await soon(apart.done)
  assert.deepEqual([reply.text, apart.text, apart.conversation], ['A duck', 'A duck', undefined])
})
