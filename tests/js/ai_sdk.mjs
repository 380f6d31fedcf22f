// Runs a chat of the AI SDK, as `useChat` does, and prints its messages.

import { Chat } from '../../.tools/node_modules/@ai-sdk/react/dist/index.js'
import { DefaultChatTransport } from '../../.tools/node_modules/ai/dist/index.js'
import { createInterface } from 'node:readline'

const [api, id] = process.argv.slice(2)
const tell = (what) => console.log(JSON.stringify(what))
const chat = new Chat({
  id,
  transport: new DefaultChatTransport({ api }),
  onFinish: (finished) => tell({ finished }),
  onError: (error) => tell({ failed: error.message }),
})
chat['~registerMessagesCallback'](() => tell({ messages: chat.messages }))

const commands = {
  say: ({ text }) => chat.sendMessage({ text }),
  stop: () => chat.stop(),
}
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...given } = JSON.parse(line)
  commands[command](given)
}
