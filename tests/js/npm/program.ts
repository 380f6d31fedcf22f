// A program of a user of the npm package. It prints what it sees as one JSON object.
import { createElement } from 'react'
import type { UIMessageChunk } from 'ai'
import { Chat, connect, newId, Reply, ReplyError } from 'wsserver'
import type { Block, ClientFrame, Events, History, Item, Message, Options, PromptOptions, Result, ServerFrame, State, Usage } from 'wsserver'
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
chat.on('message', (frame: ServerFrame) => { if (frame.type === 'hello' && frame.limits.prompt_size > 0) remove() })

const reply: Reply = chat.prompt('Count')
let text = ''
for await (const part of reply) text += part
const result: Result = await reply.done
const blocks: Block[] = reply.blocks
const usage: Usage | undefined = result.usage
const tokens: number = usage?.output_tokens ?? 0

/** The type of a block, a frame or an error tells its keys. */
function shown(block: Block): string {
  if (block.type === 'text') return block.text
  if (block.type === 'tool_use') return block.name
  return block.type === 'image' && block.source.type === 'url' ? block.source.url : ''
}
function textOf(frame: ServerFrame): string {
  return frame.type === 'token' || frame.type === 'thinking' ? frame.text : frame.type === 'error' ? frame.code : ''
}
const sent: ClientFrame[] = [{ prompt: 'Hello', on_busy: 'queue' }, { type: 'stop' }]
const cached = { type: 'text', text: 'Hello', cache_control: { type: 'ephemeral' } }
// @ts-expect-error: members of the implementation are not in the types
void reply._receive

const how: PromptOptions = { onBusy: 'queue', maxTokens: 100, retryOf: reply.id }
const endless = chat.prompt([{ ...cached, text: 'Wait' }], how)
endless.addEventListener('change', () => { if (endless.text) endless.stop() })
const stopped = await endless.done

const refused: unknown = await chat.open('unknown-conversation').catch((error: unknown) => error)
const code: ReplyError['code'] = refused instanceof ReplyError && !refused.retryable ? refused.code : 'none'
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
  const view: [ChatMessage[], Status, State] = [messages, status, connection]
  return createElement('p', {}, JSON.stringify(view.slice(1).join(' ')).replaceAll('"', ''))
}

console.log(JSON.stringify({
  text, reason: result.reason, blocks: blocks.map(shown), tokens, sent, textOf: textOf({ type: 'pong' }), stopped, code, roles: messages.map(({ role }) => role), states,
  title: items[0]?.title, chunks, html: renderToString(createElement(App)),
}))
