// A program of a user of the npm package. It prints what it sees as one JSON object.
import { createElement } from 'react'
import type { UIMessageChunk } from 'ai'
import { Chat, connect, newId, Reply, ReplyError } from 'wsserver'
import type { Block, Events, Frame, History, Item, Message, Options, PromptOptions, Result, State } from 'wsserver'
import { ChatTransport } from 'wsserver/ai-sdk'
import type { Body, Options as TransportOptions } from 'wsserver/ai-sdk'
import { useChat } from 'wsserver/react'
import type { ChatMessage, Status } from 'wsserver/react'

const url = process.argv[2] ?? ''
const conversation: string = newId()
const options: Options = { conversation, token: async () => '', heartbeat: 10_000 }
const chat: Chat = connect(url, { ...options, token: undefined })
const states: State[] = []
const remove: () => void = chat.on('state', ({ state }: Events['state']) => states.push(state))
chat.on('message', (frame: Frame) => { if (frame['type'] === 'hello') remove() })

const reply: Reply = chat.prompt('Count')
let text = ''
for await (const part of reply) text += part
const result: Result = await reply.done
const blocks: Block[] = reply.blocks

const how: PromptOptions = { onBusy: 'queue', maxTokens: 100, retryOf: reply.id }
const endless = chat.prompt([{ type: 'text', text: 'Wait' }], how)
endless.addEventListener('change', () => { if (endless.text) endless.stop() })
const stopped = await endless.done

const refused: unknown = await chat.open('unknown-conversation').catch((error: unknown) => error)
const code = refused instanceof ReplyError && !refused.retryable ? refused.code : 'none'
const history: History = await chat.open(conversation)
const before: number | undefined = history.before
await chat.open(conversation, { before })
const messages: Message[] = history.messages
await chat.rename(conversation, 'A name')
const { items, next }: { items: Item[], next?: string | undefined } = await chat.list({ limit: 1 })
await chat.list({ before: next })
await chat.delete(conversation)
chat.close()

const body: Body = { max_tokens: 100 }
const given: TransportOptions = { body: () => body }
const transport = new ChatTransport(url, given)
const stream = await transport.sendMessages({
  chatId: newId(), trigger: 'submit-message', messageId: undefined, abortSignal: undefined,
  messages: [{ id: 'm1', role: 'user', parts: [{ type: 'text', text: 'Count' }] }],
})
const chunks: UIMessageChunk['type'][] = []
for (const reader = stream.getReader(); ;) {
  const { done, value } = await reader.read()
  if (done) break
  chunks.push(value.type)
}
transport.close()

const { renderToString } = await import('react-dom/server' as string) // it has no types here
function App() {
  const { messages, status, connection } = useChat({ url })
  const shown: [ChatMessage[], Status, State] = [messages, status, connection]
  return createElement('p', {}, JSON.stringify(shown.slice(1).join(' ')).replaceAll('"', ''))
}

console.log(JSON.stringify({
  text, reason: result.reason, blocks, stopped, code, roles: messages.map(({ role }) => role), states,
  title: items[0]?.title, chunks, html: renderToString(createElement(App)),
}))
