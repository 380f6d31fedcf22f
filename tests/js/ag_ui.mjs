// Runs agents of AG-UI's client, whose verifier throws at events out of order, and prints what they saw.

import { HttpAgent, runHttpRequest, transformHttpEventStream } from '../../.tools/node_modules/@ag-ui/client/dist/index.mjs'
import { createInterface } from 'node:readline'

class ChatAgent extends HttpAgent {
  connect(input) {
    this.abortController = new AbortController()
    const asked = () => this.fetch(`${this.url}/connect`, this.requestInit(input))
    return transformHttpEventStream(runHttpRequest(asked))
  }
}

const [url, threadId] = process.argv.slice(2)
const tell = (what) => console.log(JSON.stringify(what))
console.warn = (message) => tell({ warning: message })
const events = {
  onEvent: ({ event }) => tell({ event }),
  onRunFinishedEvent: ({ outcome }) => tell({ outcome }),
  onRunFailed: ({ error }) => tell({ failed: error.message }),
}
const make = () => new ChatAgent({ url, threadId })
let agent = make()
let number = 0

function follow(run) {
  run.catch(() => {}).finally(() => tell({ messages: agent.messages }))
}

const commands = {
  say: ({ text, props }) => {
    number += 1
    agent.addMessage({ id: `question-${number}`, role: 'user', content: text })
    follow(agent.runAgent({ runId: `run-${number}`, forwardedProps: props }, events))
  },
  connect: () => follow(agent.connectAgent({ runId: 'run-connect' }, events)),
  abort: () => agent.abortRun(),
  reload: () => { agent = make() },
  stop: async () => {
    const response = await fetch(`${url}/${threadId}/stop`, { method: 'POST' })
    tell({ stopped: await response.json() })
  },
}
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...given } = JSON.parse(line)
  commands[command](given)
}
