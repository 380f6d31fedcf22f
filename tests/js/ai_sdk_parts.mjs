// Reads parts of replies, one a line. Prints those that the AI SDK's schema refuses, and the messages that it makes.

import { asSchema, readUIMessageStream, uiMessageChunkSchema } from '../../.tools/node_modules/ai/dist/index.js'
import { text } from 'node:stream/consumers'

const parts = (await text(process.stdin)).trim().split('\n').map((line) => JSON.parse(line))
const schema = asSchema(uiMessageChunkSchema)
const complaints = []
for (const part of parts) {
  const found = await schema.validate(part)
  if (!found.success) complaints.push([part, found.error.message])
}
console.log(JSON.stringify(complaints))

const messages = new Map()
for (const start of parts.filter(({ type }) => type === 'start')) {
  const begin = parts.indexOf(start), next = parts.findIndex(({ type }, index) => index > begin && type === 'start')
  const stream = ReadableStream.from(parts.slice(begin, next < 0 ? undefined : next))
  for await (const message of readUIMessageStream({ stream })) messages.set(message.id, message)
}
console.log(JSON.stringify([...messages.values()]))
