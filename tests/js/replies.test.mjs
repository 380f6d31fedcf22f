// Replies of the JavaScript client, against a real server whose model obeys the prompts.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { newId } from '../../wsserver/web/client.js'
import { read, rejects, says, soon, Stage, until } from './stage.mjs'

let stage
before(() => { stage = new Stage() })
after(() => stage.end())

test('a prompt yields its text piece by piece, and its end', async (t) => {
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

test('prompts continue one conversation, and messages belong to none', async (t) => {
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

test('the iteration throws an error after the text', async (t) => {
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

test('a stop ends the reply and closes upstream', async (t) => {
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

test('a prompt with the id of a running reply returns that reply', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('say twice', { id: 'a-name-for-two-prompts' })
  assert.equal(chat.prompt('say twice', { id: reply.id }), reply)
  await soon(reply.done)
  assert.equal(reply.text, 'twice')
})

test('a prompt that is stopped before the connection is not sent', async (t) => {
  const { chat, sockets } = await stage.serve(t)
  const reply = chat.prompt('say nothing')
  assert.deepEqual(await soon(reply.stop()), { reason: 'stopped', by: 'client' })
  await soon(chat.prompt('say x').done)
  assert.equal(await stage.asked('say nothing'), 0)
  assert.ok(!sockets[0].sent.some(({ type }) => type === 'stop'))
})

test('several replies at once; one conversation is busy, queues, or is interrupted', async (t) => {
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

test('leaving an iteration does not stop the reply', async (t) => {
  const { chat } = await stage.serve(t)
  const reply = chat.prompt('say a; wait brk; say b')
  for await (const _ of reply) break
  await stage.release('brk')
  await soon(reply.done)
  assert.equal(reply.text, 'ab')
})
