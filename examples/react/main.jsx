// A chat with the React hook. With a server on port 3001: `npm install && npm start`, then http://localhost:8000.

import { createRoot } from 'react-dom/client'
import { App } from './App.jsx'

const root = createRoot(document.body.appendChild(document.createElement('div')))
const conversation = location.hash.slice(1) || undefined // after a reload
const onConversation = (id) => history.replaceState(null, '', `#${id}`)
root.render(<App url="ws://localhost:3001" {...{ conversation, onConversation }} />)
