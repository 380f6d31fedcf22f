// A chat with `useChat` of the AI SDK. With a server on port 3001: `npm install && npm start`, then http://localhost:8000.

import { createRoot } from 'react-dom/client'
import { ChatTransport } from '../../wsserver/web/ai-sdk.js' // in your own project: 'wsserver/ai-sdk'
import { App } from './App.jsx'

const transport = new ChatTransport('ws://localhost:3001/ws')
// Over plain HTTP: new DefaultChatTransport({ api: 'http://localhost:3001/api/chat' }), without `transport.history`.

location.hash ||= crypto.randomUUID()
const id = location.hash.slice(1)
const root = createRoot(document.body.appendChild(document.createElement('div')))
transport.history(id).then((messages) => root.render(<App {...{ id, transport, messages }} />))
