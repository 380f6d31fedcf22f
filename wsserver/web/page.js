/** The page at `/`: one conversation, and the list of all conversations. */

import { textOf, withText } from './attachments.js'
import { connect, newId } from './client.js'
import { Composer } from './compose.js'
import { find, isComposing } from './dom.js'
import { Drafts } from './drafts.js'
import { isDrawerOpen, setDrawer } from './drawer.js'
import { Editing } from './editing.js'
import { offerExport } from './export.js'
import { Login } from './login.js'
import { showFailure, showNotice } from './notice.js'
import { followEnd } from './scroll.js'
import { Settings } from './settings.js'
import './shortcuts.js'
import { Sidebar } from './sidebar.js'
import { setTabTitle, tellOfEnd } from './tab.js'
import { Turns } from './turns.js'

/** @typedef {import('./client.js').Reply} Reply */
/** @typedef {import('./client.js').History} History */
/** @typedef {import('./attachments.js').Content} Content */
/** @typedef {import('./turn.js').Turn} Turn */

const OVERTAKEN = 'The conversation went on, so the last message was not replaced.'
const NEW_TITLE = 'New conversation'
const ID = /^[A-Za-z0-9_-]{16,64}$/
const heading = find(document, '#title', HTMLElement)
const state = find(document, '#state', HTMLElement)
const hint = find(document, '#hint', HTMLElement)
const log = find(document, '#log', HTMLElement)
const older = find(document, '#older', HTMLButtonElement)
const exporter = find(document, '#export', HTMLButtonElement)
const announcement = find(document, '#announcement', HTMLElement)
const form = find(document, '#compose', HTMLFormElement)
const drafts = new Drafts()
const settings = new Settings()
const composer = new Composer(drafts, {
  onSend(text, interrupts) {
    const edited = editing.end()
    ask(withText(edited?.content ?? '', text), { interrupts, retryOf: edited?.id })
  },
  onStop: stop,
})
const editing = new Editing(composer, () => (turns.last?.isEditable ? turns.last : undefined))
const turns = new Turns({ onRetry: retry, onEnd: showEnd, onEdit: edit, onRemove: takeBack, onRewrite: (turn) => editing.begin(turn) })

/** @type {string | undefined} The conversation on the page; undefined before the first prompt of a new one. */ let current
/** @type {string | undefined} The conversation whose changes the server sends. */ let followed
let fallbackTitle = '' // for a conversation that is not in the list

const login = new Login((token) => {
  chat.setToken(token)
  composer.focus(true)
})
const chat = connect(new URL('ws', location.href), { token: login.token })
const sidebar = new Sidebar(chat, {
  onChange: showTitle,
  onDelete(id, isOwn) {
    const text = id === current && !isOwn ? composer.text : ''
    drafts.delete(id)
    settings.delete(id)
    if (id !== current) return
    startNew()
    if (text) composer.insert(text)
    showNotice('This conversation was deleted.')
  },
})

// The connection.

chat.on('state', ({ state: now, reason }) => {
  const hadToken = login.token !== undefined
  if (now === 'unauthenticated' && login.refuse()) return
  document.body.dataset.state = now
  state.textContent = {
    connecting: 'Connecting…',
    open: 'Connected',
    waiting: 'Not connected, trying again…',
    idle: 'Idle; the next message connects',
    unauthenticated: hadToken ? 'Not connected: your token is invalid or has expired.' : 'Not connected',
    closed: `The server closed the connection${reason && `: ${reason}`}. Reload the page to connect again.`,
  }[now]
  form.hidden = now === 'unauthenticated'
  composer.disabled = now === 'closed'
  login.show(now === 'unauthenticated')
  for (const turn of turns) showWaiting(turn)
  if (now === 'open') sidebar.refresh()
})

chat.on('models', ({ models }) => { settings.models = models })

chat.on('history', (history) => {
  if (history.conversation === current) showHistory(history)
})

chat.on('reply', (reply) => {
  if (reply.conversation === current) follow(reply)?.showTimes(Date.now() / 1000)
})

chat.on('error', (error) => {
  const { code } = /** @type {Partial<import('./client.js').ReplyError>} */ (error)
  if (code !== 'not_found') showFailure(error)
  else if (current !== undefined && chat.conversation !== current) {
    followed = undefined
    editing.leave(true)
    showNotice('The server no longer has this conversation. Your next message starts a new one.')
  }
})

/** Show in a running turn that there is no connection. @param {Turn} turn */
function showWaiting(turn) {
  const started = turn.reply?.started
  const note = started ? 'The connection was lost. The rest of the reply follows after a reconnect.' : 'Not sent yet.'
  turn.setWaiting(chat.state === 'open' ? '' : note)
}

// The conversation.

/** Show the conversation of the address. */
function showAddress() {
  const id = location.hash.slice(1)
  if (id === current) return
  if (ID.test(id)) open(id)
  else startNew()
}

/** Remove all turns from the page. @param {string | undefined} id The conversation that comes next. */
function clear(id) {
  turns.clear()
  current = id
  followed = undefined
  log.ariaBusy = null
  fallbackTitle = ''
  followEnd()
  showNotice('')
  editing.suspend()
  composer.open(id)
  settings.open(id)
  sidebar.select(id)
  update()
}

/** Begin a new conversation. */
function startNew() {
  clear(undefined)
  chat.conversation = newId()
  if (location.hash) history.replaceState(null, '', location.pathname + location.search)
}

/** Load a conversation. @param {string} id */
async function open(id) {
  clear(id)
  log.ariaBusy = 'true'
  update()
  try {
    await chat.open(id)
  } catch (error) {
    if (id !== current) return
    const { code, retryable } = /** @type {import('./client.js').ReplyError} */ (error)
    if (code !== 'not_found') return showFailure(error, retryable ? () => open(id) : undefined)
    const restored = drafts.restoreUnsent(id, undefined, () => false)
    drafts.delete(id)
    if (restored) settings.giveToNew(id)
    startNew()
    showNotice(restored ? 'Your message did not reach the server. Send it again.' : 'There is no such conversation.')
  } finally {
    if (id === current) log.ariaBusy = null
    update()
  }
}

/** Load the messages again. If this fails, a reconnect loads them. */
function reload() {
  if (current !== undefined) chat.open(current).catch(() => {})
}

/** Show a history: all messages, or after a reconnect the new ones. @param {History} history */
function showHistory({ conversation, title, messages, replies, before }) {
  const isFirst = followed === undefined
  if (!isFirst) for (const turn of turns.replacedBy(messages, replies)) remove(turn)
  if (isFirst || !messages.some(({ id = '' }) => turns.get(id))) turns.before = before // it does not continue the messages on the page
  followed = conversation
  fallbackTitle = title
  turns.show(messages)
  for (const reply of chat.replies.values()) if (reply.conversation === conversation) follow(reply)
  if (isFirst && drafts.restoreUnsent(conversation, conversation, (id) => turns.get(id) !== undefined)) composer.open(conversation)
  if (isFirst) editing.resume(drafts.getEdit(conversation))
  update()
}

older.addEventListener('click', async () => {
  if (current === undefined) return
  const id = current
  try {
    const earlier = await chat.open(id, { before: turns.before })
    if (id !== current) return
    turns.showEarlier(earlier)
    if (older.hidden) composer.focus(true)
  } catch (error) {
    showFailure(error)
  }
})

/** Show a running reply. @param {Reply} reply @param {Content} [content] The prompt, if this page sent it. @returns {Turn | undefined} Its turn, if it is new. */
function follow(reply, content) {
  if (turns.get(reply.id)) return undefined
  const turn = turns.append(reply.id)
  if (content !== undefined) turn.setPrompt(content)
  turn.follow(reply)
  showWaiting(turn)
  const onChange = () => {
    if (!reply.started && !reply.ended) return
    reply.removeEventListener('change', onChange)
    const replaced = reply.started && reply.retryOf !== undefined && turns.get(reply.retryOf)
    if (replaced) remove(replaced)
    // The conversation exists now, so the page can follow the prompts of other tabs.
    if (current !== undefined && reply.started && reply.conversation === current && followed !== current) {
      followed = current
      reload()
      sidebar.announce()
    }
  }
  reply.addEventListener('change', onChange)
  reply.done.catch(() => {}).then(update)
  onChange()
  update()
  return turn
}

// Turns.

/**
 * Send a prompt. While a reply runs, the prompt waits for its end.
 * @param {Content} content
 * @param {{retryOf?: string, interrupts?: boolean}} [options] `retryOf`: the id of the turn that the new one
 *   replaces. `interrupts`: stop the running reply, and wait for nothing.
 */
function ask(content, { retryOf, interrupts = false } = {}) {
  const text = textOf(content)
  if (current === undefined) {
    current = chat.conversation
    composer.moveTo(current)
    settings.moveTo(current)
    history.replaceState(null, '', `#${current}`)
    const line = text.trim().replace(/\s+/g, ' ')
    fallbackTitle = line.length > 60 ? `${line.slice(0, 59)}…` : line
    sidebar.select(current)
  }
  showNotice('')
  turns.hideRetries()
  announcement.textContent = turns.running && !interrupts ? 'The message waits for this reply.' : 'Sent.'
  const reply = chat.prompt(content, { ...settings.values, conversation: current, retryOf, onBusy: interrupts ? 'interrupt' : 'queue' })
  if (retryOf === undefined || turns.get(retryOf)?.prompt !== text) drafts.keepUnsent(current, reply.id, text)
  follow(reply, content)?.showTimes(Date.now() / 1000)
  followEnd()
}

/** @param {Turn} turn */
async function retry(turn) {
  if (turn.content === undefined && current !== undefined) await chat.open(current).catch(showFailure)
  const { content, refused } = turn
  if (content === undefined || (turns.running && !refused)) return
  if (refused) remove(turn) // the server has no such turn to replace
  ask(content, { retryOf: refused ? turn.retryOf : turn.id })
  composer.focus(true)
}

/** Take a prompt back that has no reply. @param {Turn} turn */
function takeBack(turn) {
  const { reply } = turn
  reply?.stop().then(({ usage }) => {
    // The reply had just begun, so the history has the prompt.
    if (usage?.input_tokens && reply.conversation === current) reload()
  }, () => {})
  remove(turn)
  update()
  composer.focus()
}

/** Take a prompt back that has no reply, and put it into the box. @param {Turn} turn */
function edit(turn) {
  composer.insert(turn.prompt)
  takeBack(turn)
  composer.focus(true)
}

/** @param {Turn} turn @param {string} note */
function showEnd(turn, note) {
  const { error, text } = turn
  const isFinal = turn.refused && !error?.retryable && error?.code !== 'closed'
  if (!isFinal || !giveBack(turn)) {
    announcement.textContent = `${text.length > 1500 ? `The reply is complete: ${text.length} characters.` : text} ${note}`
  }
  tellOfEnd()
  if (turn.element.nextElementSibling && !turn.refused) turn.hideRetry() // only the last turn can be replaced
  if (turn.isTakenBack) remove(turn) // by another tab
  else if (!turn.refused && !turn.isUnsent) drafts.dropUnsent(current, turn.id)
  const lacksPrompt = turn.content === undefined && !turn.isUnsent
  if (lacksPrompt || (turn.isGone && !turn.refused)) reload() // the history has the prompt's blocks, or the reply
  update()
  sidebar.announce()
}

/** Give a prompt back that the server will never accept. @param {Turn} turn @returns {boolean} Whether a notice tells of it. */
function giveBack(turn) {
  const { error, prompt, content, retryOf } = turn
  const replaced = retryOf === undefined ? undefined : turns.get(retryOf)
  const isEdit = replaced?.prompt !== prompt
  if (retryOf === undefined || (error?.code !== 'not_last' && !replaced?.isReplaceable)) {
    if (!composer.isEmpty) return false
    composer.insert(prompt)
    drafts.dropUnsent(current, turn.id)
    return false
  }
  remove(turn)
  if (error?.code === 'not_last') {
    if (isEdit) composer.insert(prompt)
    showNotice(OVERTAKEN + (isEdit ? ` Your text is in the box${typeof content === 'string' ? '' : ', without the attachments'}.` : ''))
    reload()
    return true
  }
  if (isEdit && replaced && composer.isEmpty) editing.begin(replaced, prompt)
  else if (isEdit) composer.insert(prompt)
  showFailure(error)
  return true
}

/** @param {Turn} turn */
function remove(turn) {
  drafts.dropUnsent(current, turn.id)
  turns.remove(turn)
}

/** Stop the running reply. The next prompt that waits follows. */
function stop() {
  turns.running?.stop()
}

// Title, buttons.

function update() {
  turns.showQueue()
  composer.busy = turns.running !== undefined
  if (editing.leave()) showNotice(`${OVERTAKEN} Your text is in the box.`)
  exporter.hidden = turns.size === 0
  hint.hidden = turns.size > 0 || log.ariaBusy === 'true'
  showTitle()
}

function showTitle() {
  const title = current === undefined ? NEW_TITLE : (sidebar.title(current) ?? fallbackTitle) || NEW_TITLE
  if (heading.textContent !== title) heading.textContent = title
  setTabTitle(current === undefined ? 'wsserver' : `${title} · wsserver`)
}

// Input.

for (const idea of document.querySelectorAll('#ideas button')) {
  idea.addEventListener('click', () => {
    ask(find(idea, 'span', HTMLElement).textContent ?? '')
    composer.focus()
  })
}
addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || isComposing(event) || event.defaultPrevented || document.querySelector('dialog[open]')) return
  if (isDrawerOpen()) setDrawer(false)
  else stop()
})
addEventListener('pointerover', ({ target }) => { // people who see the icon get its name, too
  const icon = target instanceof Element ? target.closest('.icon, #send') : null
  if (icon instanceof HTMLElement) icon.title = icon.ariaLabel ?? ''
})
find(document, '#skip', HTMLElement).addEventListener('click', (event) => {
  event.preventDefault() // the address keeps the hash of the conversation
  composer.focus(true)
})
find(document, '#jump', HTMLElement).addEventListener('click', () => composer.focus())

find(document, '#side', HTMLElement).addEventListener('click', (event) => {
  const link = event.target instanceof Element && event.target.closest('a')
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return
  if (link.id === 'new') { // its address has no hash
    event.preventDefault()
    if (current !== undefined) history.pushState(null, '', location.pathname + location.search)
    startNew()
  }
  setDrawer(false)
  composer.focus(link.id === 'new' || undefined)
})

offerExport(chat, () => current === undefined ? undefined : { id: current, title: heading.textContent ?? '' })

addEventListener('hashchange', showAddress)
addEventListener('popstate', showAddress)
addEventListener('visibilitychange', () => {
  if (document.visibilityState === 'visible' && chat.state === 'open') sidebar.refresh()
})
composer.focus()
showAddress()
