/** The page at `/`: one conversation, and the list of all conversations. */

import { connect, newId } from './client.js'
import { copy, find } from './dom.js'
import { foldCode } from './markdown.js'
import { Sidebar } from './sidebar.js'
import { REPLY_GONE, Turn } from './turn.js'

/** @typedef {import('./client.js').Reply} Reply */
/** @typedef {import('./client.js').History} History */

const NEW_TITLE = 'New conversation'
const ID = /^[A-Za-z0-9_-]{16,64}$/
const NEAR_END = 40 // pixels from the end that count as the end
const hovers = matchMedia('(hover: hover)') // on other devices the focus opens the keyboard
const root = document.documentElement
const side = find(document, '#side', HTMLElement)
const main = find(document, 'main', HTMLElement)
const menu = find(document, '#menu', HTMLButtonElement)
const heading = find(document, '#title', HTMLElement)
const state = find(document, '#state', HTMLElement)
const hint = find(document, '#hint', HTMLElement)
const log = find(document, '#log', HTMLElement)
const older = find(document, '#older', HTMLButtonElement)
const jump = find(document, '#jump', HTMLButtonElement)
const notice = find(document, '#notice', HTMLElement)
const announcement = find(document, '#announcement', HTMLElement)
const login = find(document, '#login', HTMLFormElement)
const token = find(document, '#token', HTMLInputElement)
const form = find(document, '#compose', HTMLFormElement)
const box = find(document, '#prompt', HTMLTextAreaElement)
const send = find(document, '#send', HTMLButtonElement)
const storage = openStorage()

/** @type {Map<string, Turn>} The turns on the page, in order. */ let turns = new Map()
/** @type {string | undefined} The conversation on the page; undefined before the first prompt of a new one. */ let current
/** @type {string | undefined} The conversation whose changes the server sends. */ let followed
/** @type {number | undefined} The `before` of the earlier messages, if there are any. */ let before
let fallbackTitle = '' // for a conversation that is not in the list
let usedToken = storage.token // the token that this tab has used
let atEnd = true // the reader follows the end of the text
let lastScrollY = 0

const chat = connect(new URL('ws', location.href), { token: usedToken })
const sidebar = new Sidebar(chat, {
  onChange: showTitle,
  onDelete(id) {
    if (id !== current) return
    startNew()
    showNotice('This conversation was deleted.')
  },
})

// The connection.

chat.on('state', ({ state: now, reason }) => {
  const hadToken = usedToken !== undefined
  if (now === 'unauthenticated') {
    const { token: other } = storage // entered in another tab
    if (other !== undefined && other !== usedToken) return useToken(other)
    usedToken = undefined
    delete storage.token
  }
  document.body.dataset.state = now
  state.textContent = {
    connecting: 'Connecting…',
    open: 'Connected',
    waiting: 'Not connected, trying again…',
    idle: 'Idle; the next message connects',
    unauthenticated: hadToken ? 'Not connected: your token is invalid or has expired.' : 'Not connected',
    closed: `The server closed the connection${reason && `: ${reason}`}. Reload the page to connect again.`,
  }[now]
  login.hidden = now !== 'unauthenticated'
  form.hidden = !login.hidden
  box.disabled = send.disabled = now === 'closed'
  if (!login.hidden) token.focus()
  for (const turn of turns.values()) showWaiting(turn)
  if (now === 'open') sidebar.refresh()
})

chat.on('history', (history) => {
  if (history.conversation === current) showHistory(history)
})

chat.on('reply', (reply) => {
  if (reply.conversation === current) follow(reply)
})

chat.on('error', (error) => {
  const { code, message } = /** @type {Partial<import('./client.js').ReplyError>} */ (error)
  if (code !== 'not_found') showNotice(message ?? String(error))
  else if (current !== undefined && chat.conversation !== current) {
    followed = undefined
    showNotice('The server no longer has this conversation. Your next message starts a new one.')
  }
})

/** Show in a running turn that there is no connection. @param {Turn} turn */
function showWaiting(turn) {
  const started = turn.reply?.started
  const note = started ? 'The connection was lost. The rest of the reply follows after a reconnect.' : 'Not sent yet.'
  turn.setWaiting(chat.state === 'open' ? '' : note)
}

/** Return the local storage, or an empty object where the browser forbids it. @returns {Record<string, any>} */
function openStorage() {
  try {
    return localStorage
  } catch {
    return {}
  }
}

/** @param {string | undefined} token */
function useToken(token) {
  usedToken = token
  chat.setToken(token)
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
  for (const turn of turns.values()) turn.remove()
  turns = new Map()
  current = id
  followed = before = undefined
  fallbackTitle = ''
  atEnd = jump.hidden = older.hidden = true
  showNotice('')
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
    const { message, code, retryable } = /** @type {import('./client.js').ReplyError} */ (error)
    if (code === 'not_found') startNew()
    showNotice(code === 'not_found' ? 'There is no such conversation.' : message, retryable ? () => open(id) : undefined)
  } finally {
    if (id === current) log.ariaBusy = null
    update()
  }
}

/** Show a history: all messages, or after a reconnect the new ones. @param {History} history */
function showHistory({ conversation, title, messages, before: earlier }) {
  if (followed === undefined) {
    before = earlier
    older.hidden = before === undefined
  }
  followed = conversation
  fallbackTitle = title
  insertTurns(messages, /** @type {HTMLElement | null} */ (log.firstElementChild))
  for (const reply of chat.replies.values()) if (reply.conversation === conversation) follow(reply)
  update()
}

/**
 * Show the turns of a history. A turn that the page shows as a whole stays.
 * @param {History['messages']} messages
 * @param {Element | null} place The element before which the first new turn goes.
 */
function insertTurns(messages, place) {
  /** @type {Map<string, import('./turn.js').SavedTurn>} */
  const saved = new Map()
  for (const message of messages) {
    const { role, content, id = newId() } = message
    const turn = saved.get(id) ?? {}
    if (role === 'user') turn.prompt = content
    else turn.reply = message
    saved.set(id, turn)
  }
  for (const [id, each] of saved) {
    let turn = turns.get(id)
    if (turn) place = turn.element.nextElementSibling
    else log.insertBefore((turn = addTurn(id)).element, place)
    if (!turn.shows(each)) turn.showSaved(each)
  }
  for (const turn of turns.values()) if (saved.has(turn.id) && turn.element.nextElementSibling) turn.hideRetry()
}

older.addEventListener('click', async () => {
  if (current === undefined || before === undefined) return
  const id = current
  try {
    const page = await chat.open(id, { before })
    if (id !== current) return
    const first = log.firstElementChild
    const y = first?.getBoundingClientRect().top ?? 0
    before = page.before
    older.hidden = before === undefined
    insertTurns(page.messages, first)
    scrollBy(0, (first?.getBoundingClientRect().top ?? 0) - y) // keeps the text in place that was visible
    if (older.hidden) box.focus({ preventScroll: true })
  } catch (error) {
    showNotice(error instanceof Error ? error.message : String(error))
  }
})

/** @param {string} id */
function addTurn(id) {
  const turn = new Turn(id, { onRetry: retry, onEnd: showEnd })
  turns.set(id, turn)
  return turn
}

/** Show a running reply. @param {Reply} reply */
function follow(reply) {
  if (turns.has(reply.id)) return
  const turn = addTurn(reply.id)
  turn.follow(reply)
  showWaiting(turn)
  log.append(turn.element)
  const onChange = () => {
    if (!reply.started && !reply.ended) return
    reply.removeEventListener('change', onChange)
    const replaced = reply.started && reply.retryOf !== undefined && turns.get(reply.retryOf)
    if (replaced) remove(replaced)
    // The conversation exists now, so the page can follow the prompts of other tabs.
    if (current !== undefined && reply.started && reply.conversation === current && followed !== current) {
      followed = current
      chat.open(current).catch(() => {})
      sidebar.announce()
    }
  }
  reply.addEventListener('change', onChange)
  reply.done.catch(() => {}).then(update)
  onChange()
  update()
}

// Turns.

/** @param {string} text @param {string} [retryOf] The id of the turn that the new one replaces. */
function ask(text, retryOf) {
  if (current === undefined) {
    current = chat.conversation
    history.replaceState(null, '', `#${current}`)
    fallbackTitle = text.trim().replace(/\s+/g, ' ').slice(0, 60)
    sidebar.select(current)
  }
  atEnd = true
  showNotice('')
  for (const turn of turns.values()) turn.hideRetry()
  announcement.textContent = 'Sent.'
  follow(chat.prompt(text, { conversation: current, retryOf }))
  scrollToEnd()
}

/** @param {Turn} turn */
function retry(turn) {
  const { prompt, refused } = turn
  if (isRunning()) return
  if (refused) remove(turn) // the server has no such turn to replace
  ask(prompt, refused ? turn.retryOf : turn.id)
  box.focus()
}

/** @param {Turn} turn @param {string} note */
function showEnd(turn, note) {
  const { error, text } = turn
  announcement.textContent = `${text.length > 1500 ? `The reply is complete: ${text.length} characters.` : text} ${note}`
  if (turn.refused && !error?.retryable && error?.code !== 'closed') {
    box.value ||= turn.prompt
    growBox()
  }
  if (error && REPLY_GONE.includes(error.code) && !turn.refused && current) chat.open(current).catch(() => {})
  update()
  sidebar.announce()
}

/** @param {Turn} turn */
function remove(turn) {
  turn.remove()
  turns.delete(turn.id)
}

/** Whether a reply runs or waits. */
const isRunning = () => [...turns.values()].some(({ reply }) => reply && !reply.ended)

function stop() {
  for (const { reply } of turns.values()) reply?.stop()
}

// Title, notice, buttons.

function update() {
  const busy = isRunning()
  send.classList.toggle('stop', busy)
  send.setAttribute('aria-label', busy ? 'Stop' : 'Send')
  hint.hidden = turns.size > 0 || log.ariaBusy === 'true'
  showTitle()
}

function showTitle() {
  const title = current === undefined ? NEW_TITLE : (sidebar.title(current) ?? fallbackTitle) || NEW_TITLE
  if (heading.textContent !== title) heading.textContent = title
  document.title = current === undefined ? 'wsserver' : `${title} · wsserver`
}

/** @param {string} text @param {() => void} [retry] What the button of the notice does. */
function showNotice(text, retry) {
  const button = find(notice, 'button', HTMLButtonElement)
  find(notice, 'span', HTMLElement).textContent = text
  notice.hidden = !text
  button.hidden = !retry
  button.onclick = retry ?? null
}

// Scrolling.

function scrollToEnd() {
  scrollTo({ top: root.scrollHeight, behavior: 'instant' })
}

const belowView = () => root.scrollHeight - innerHeight - scrollY

addEventListener('scroll', () => {
  atEnd = scrollY < lastScrollY ? atEnd && belowView() < 1 : atEnd || belowView() < NEAR_END
  lastScrollY = scrollY
  jump.hidden = atEnd
}, { passive: true })

// If the page grows, a reader at the end stays there. The observer runs after layout and before paint.
const sizes = new ResizeObserver(() => {
  if (atEnd) scrollToEnd()
})
sizes.observe(main)
addEventListener('resize', () => {
  if (atEnd) scrollToEnd()
})

jump.addEventListener('click', () => {
  atEnd = jump.hidden = true
  scrollToEnd()
  if (hovers.matches) box.focus()
})

// Input.

function submit() {
  const text = box.value.toWellFormed?.() ?? box.value
  if (isRunning() || !text.trim() || box.disabled) return
  box.value = ''
  growBox()
  ask(text)
}

// For browsers without `field-sizing`.
function growBox() {
  if (CSS.supports('field-sizing', 'content')) return
  box.style.height = 'auto'
  box.style.height = `${box.scrollHeight}px`
}

form.addEventListener('submit', (event) => event.preventDefault())
send.addEventListener('click', (event) => {
  if (event.detail > 1) return // the second click of a double click must not stop the reply
  if (isRunning()) stop()
  else submit()
  if (hovers.matches) box.focus()
})
box.addEventListener('input', growBox)
box.addEventListener('keydown', (event) => {
  // In Safari the key that ends a composition comes after its end, with this code.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return
  event.preventDefault()
  submit()
})
addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented || document.querySelector('dialog[open]')) return
  if (document.body.classList.contains('listing')) setDrawer(false)
  else stop()
})
log.addEventListener('click', (event) => {
  const { target } = event
  if (!(target instanceof Element)) return
  if (target.closest('summary')) { // the reader wants to see the opened text, not the end
    atEnd = false
    requestAnimationFrame(() => { atEnd = jump.hidden = belowView() < 1 })
  }
  const figure = target.closest('figure')
  if (figure instanceof HTMLElement) onCodeButton(figure, target)
  const link = target.closest('a[href^="#"]')
  if (link) { // of a footnote; the address keeps the hash of the conversation
    event.preventDefault()
    document.getElementById(link.getAttribute('href')?.slice(1) ?? '')?.scrollIntoView({ block: 'center' })
  }
})
/** @param {HTMLElement} figure @param {Element} target */
function onCodeButton(figure, target) {
  const wrap = target.closest('.wrap')
  const button = target.closest('.copy-code')
  if (target.closest('.fold')) foldCode(figure, !figure.classList.contains('folded'))
  if (wrap) wrap.setAttribute('aria-pressed', String(figure.classList.toggle('wrapped')))
  if (button) {
    copy(figure.querySelector('code')?.textContent ?? '')
    const label = find(button, 'span', HTMLElement)
    label.textContent = 'Copied'
    setTimeout(() => { label.textContent = 'Copy' }, 2000)
  }
}

login.addEventListener('submit', (event) => {
  event.preventDefault()
  storage.token = token.value.trim()
  token.value = ''
  useToken(storage.token)
  box.focus()
})
addEventListener('storage', ({ key, newValue }) => {
  if (key === 'token' && newValue && chat.state === 'unauthenticated') useToken(newValue)
})
find(document, '#skip', HTMLElement).addEventListener('click', (event) => {
  event.preventDefault() // the address keeps the hash of the conversation
  box.focus()
})

// The list is a drawer on narrow screens.

const narrow = matchMedia('(max-width: 52rem)')

/** @param {boolean} open */
function setDrawer(open) {
  const wasOpen = document.body.classList.contains('listing')
  document.body.classList.toggle('listing', open)
  menu.setAttribute('aria-expanded', String(open))
  side.inert = narrow.matches && !open
  main.inert = narrow.matches && open
  if (open) find(side, '#close-list', HTMLElement).focus()
  else if (wasOpen) menu.focus()
}

menu.addEventListener('click', () => setDrawer(true))
find(document, '#close-list', HTMLElement).addEventListener('click', () => setDrawer(false))
find(document, '#backdrop', HTMLElement).addEventListener('click', () => setDrawer(false))
narrow.addEventListener('change', () => setDrawer(false))
setDrawer(false)
side.addEventListener('click', (event) => {
  const link = event.target instanceof Element && event.target.closest('a')
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return
  if (link.id === 'new') { // its address has no hash
    event.preventDefault()
    if (current !== undefined) history.pushState(null, '', location.pathname + location.search)
    startNew()
  }
  setDrawer(false)
  if (hovers.matches || link.id === 'new') box.focus({ preventScroll: true })
})

addEventListener('hashchange', showAddress)
addEventListener('popstate', showAddress)
addEventListener('visibilitychange', () => {
  if (document.visibilityState === 'visible' && chat.state === 'open') sidebar.refresh()
})
if (hovers.matches) box.focus()
showAddress()
