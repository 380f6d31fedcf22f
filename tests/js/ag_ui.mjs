// Runs an agent of AG-UI's client, whose verifier throws at events out of order, and prints what it saw.

import { HttpAgent } from '../../.tools/node_modules/@ag-ui/client/dist/index.mjs'
import { createInterface } from 'node:readline'

const [url, threadId] = process.argv.slice(2)
const agent = new HttpAgent({ url, threadId })
const tell = (what) => console.log(JSON.stringify(what))
let number = 0
for await (const line of createInterface({ input: process.stdin })) {
  const { say, stop } = JSON.parse(line)
  if (stop) {
    agent.abortRun()
    continue
  }
  number += 1
  agent.addMessage({ id: `question-${number}`, role: 'user', content: say })
  agent.runAgent({ runId: `run-${number}` }, {
    onEvent: ({ event }) => tell({ event }),
    onRunFailed: ({ error }) => tell({ failed: error.message }),
  }).catch(() => {}).finally(() => tell({ messages: agent.messages }))
}
