/** The page at /: one conversation of a chat, and a list of the others. */

import { connect, newId } from './client.js'
import { copy, find } from './dom.js'
import { Sidebar } from './sidebar.js'
import { GONE, Turn } from './turn.js'

/** @typedef {import('./client.js').Reply} Reply */
/** @typedef {import('./client.js').History} History */

const NEW = 'New conversation'
const ID = /^[A-Za-z0-9_-]{16,64}$/
const NEAR = 40 // pixels from the end, in which a reader who scrolls down is taken to be there
const hovers = matchMedia('(hover: hover)') // else the keyboard comes up with the focus
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
const heard = find(document, '#heard', HTMLElement)
const door = find(document, '#door', HTMLFormElement)
const token = find(document, '#token', HTMLInputElement)
const form = find(document, '#ask', HTMLFormElement)
const box = find(document, '#prompt', HTMLTextAreaElement)
const send = find(document, '#send', HTMLButtonElement)
const kept = storage()

/** @type {Map<string, Turn>} What is on the page, in order. */ let turns = new Map()
/** @type {string | undefined} The conversation on the page; none: one that is to begin. */ let current
/** @type {string | undefined} The one whose news come here by themselves. */ let followed
/** @type {number | undefined} Where the messages on the page begin, if there are earlier ones. */ let before
let told = '' // the title, as far as the list does not know it
let given = kept.token // the token that this tab has tried
let atEnd = true // is where the reader wants to be
let height = 0 // at which the reader was

const chat = connect(new URL('ws', location.href), { token: given })
const sidebar = new Sidebar(chat, {
  changed: showTitle,
  deleted(id) {
    if (id !== current) return
    begin()
    say('This conversation was deleted.')
  },
})

// The connection.

chat.on('state', ({ state: now, reason }) => {
  const had = given !== undefined
  if (now === 'unauthenticated') {
    const { token: other } = kept // another tab's
    if (other !== undefined && other !== given) return enter(other)
    given = undefined
    delete kept.token
  }
  document.body.dataset.state = now
  state.textContent = {
    connecting: 'Connecting…',
    open: 'Connected',
    waiting: 'Not connected, trying again…',
    idle: 'Resting until you ask',
    unauthenticated: had ? 'Not connected: your token is not good, or no longer.' : 'Not connected',
    closed: `The server closed the connection${reason && `: ${reason}`}. Reload the page to connect again.`,
  }[now]
  door.hidden = now !== 'unauthenticated'
  form.hidden = !door.hidden
  box.disabled = send.disabled = now === 'closed'
  if (!door.hidden) token.focus()
  for (const turn of turns.values()) wait(turn)
  if (now === 'open') sidebar.refresh()
})

chat.on('history', (history) => {
  if (history.conversation === current) show(history)
})

chat.on('reply', (reply) => {
  if (reply.conversation === current) follow(reply)
})

chat.on('error', (error) => {
  const { code, message } = /** @type {Partial<import('./client.js').ReplyError>} */ (error)
  if (code !== 'not_found') say(message ?? String(error))
  else if (current !== undefined && chat.conversation !== current) {
    followed = undefined
    say('The server no longer has this conversation. What you ask next begins it anew.')
  }
})

/** Say why nothing comes, while that is so. @param {Turn} turn */
function wait(turn) {
  const sent = turn.reply?.started
  const why = sent ? 'Cut off, as the connection was lost. The rest follows when it is back.' : 'Not sent yet.'
  turn.wait(chat.state === 'open' ? '' : why)
}

/** What the browser keeps; nothing, where it lets no page keep anything. @returns {Record<string, any>} */
function storage() {
  try {
    return localStorage
  } catch {
    return {}
  }
}

/** @param {string | undefined} token */
function enter(token) {
  given = token
  chat.setToken(token)
}

// Which conversation.

function route() {
  const id = location.hash.slice(1)
  if (id === current) return
  if (ID.test(id)) open(id)
  else begin()
}

/** Have nothing on the page. @param {string | undefined} id Whose place it becomes. */
function clear(id) {
  for (const turn of turns.values()) turn.leave()
  turns = new Map()
  current = id
  followed = before = undefined
  told = ''
  atEnd = jump.hidden = older.hidden = true
  say('')
  sidebar.select(id)
  update()
}

function begin() {
  clear(undefined)
  chat.conversation = newId()
  if (location.hash) history.replaceState(null, '', location.pathname + location.search)
}

/** @param {string} id */
async function open(id) {
  clear(id)
  log.ariaBusy = 'true'
  update()
  try {
    await chat.open(id)
  } catch (error) {
    if (id !== current) return
    const { message, code, retryable } = /** @type {import('./client.js').ReplyError} */ (error)
    if (code === 'not_found') begin()
    say(code === 'not_found' ? 'There is no such conversation.' : message, retryable ? () => open(id) : undefined)
  } finally {
    if (id === current) log.ariaBusy = null
    update()
  }
}

/** Show a history: all of it, or what is new in it since the last time. @param {History} history */
function show({ conversation, title, messages, before: earlier }) {
  if (followed === undefined) {
    before = earlier
    older.hidden = before === undefined
  }
  followed = conversation
  told = title
  insert(messages, /** @type {HTMLElement | null} */ (log.firstElementChild))
  for (const reply of chat.replies.values()) if (reply.conversation === conversation) follow(reply)
  update()
}

/**
 * Put what is not there yet where it belongs among what is.
 * @param {History['messages']} messages
 * @param {Element | null} place Before which the first of them goes.
 */
function insert(messages, place) {
  /** @type {Map<string, {prompt?: string, text: string, partial?: string}>} */
  const said = new Map()
  for (const { role, content, id = newId(), partial } of messages) {
    const turn = said.get(id) ?? { text: '' }
    if (role === 'user') turn.prompt = content
    else Object.assign(turn, { text: content, partial })
    said.set(id, turn)
  }
  for (const [id, what] of said) {
    let turn = turns.get(id)
    if (turn) place = turn.element.nextElementSibling
    else log.insertBefore((turn = make(id)).element, place)
    if (!turn.has(what)) turn.tell(what)
  }
  // As on a page that was there, only the last can be tried again.
  for (const turn of turns.values()) if (said.has(turn.id) && turn.element.nextElementSibling) turn.settle()
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
    insert(page.messages, first)
    scrollBy(0, (first?.getBoundingClientRect().top ?? 0) - y) // what was read stays where it is
    if (older.hidden) box.focus({ preventScroll: true })
  } catch (error) {
    say(error instanceof Error ? error.message : String(error))
  }
})

/** @param {string} id */
function make(id) {
  const turn = new Turn(id, { retry, ended })
  turns.set(id, turn)
  return turn
}

/** Show a reply that runs. @param {Reply} reply */
function follow(reply) {
  if (turns.has(reply.id)) return
  const turn = make(reply.id)
  turn.follow(reply)
  wait(turn)
  log.append(turn.element)
  const changed = () => {
    if (!reply.started && !reply.ended) return
    reply.removeEventListener('change', changed)
    const replaced = reply.started && reply.retryOf !== undefined && turns.get(reply.retryOf)
    if (replaced) remove(replaced)
    // From here on also what others ask in it comes here.
    if (current !== undefined && reply.started && reply.conversation === current && followed !== current) {
      followed = current
      chat.open(current).catch(() => {})
      sidebar.share()
    }
  }
  reply.addEventListener('change', changed)
  reply.done.catch(() => {}).then(update)
  changed()
  update()
}

// A turn.

/** @param {string} text @param {string} [retryOf] The id of the turn whose place the new one takes. */
function ask(text, retryOf) {
  if (current === undefined) {
    current = chat.conversation
    history.replaceState(null, '', `#${current}`)
    told = text.trim().replace(/\s+/g, ' ').slice(0, 60)
    sidebar.select(current)
  }
  atEnd = true
  say('')
  for (const turn of turns.values()) turn.settle()
  heard.textContent = 'Sent.'
  follow(chat.prompt(text, { conversation: current, retryOf }))
  toEnd()
}

/** @param {Turn} turn */
function retry(turn) {
  const { prompt, refused } = turn
  if (running()) return
  if (refused) remove(turn) // the server knows nothing of it
  ask(prompt, refused ? turn.retryOf : turn.id)
  box.focus()
}

/** @param {Turn} turn @param {string} note */
function ended(turn, note) {
  const { error, text } = turn
  heard.textContent = `${text.length > 1500 ? `The reply is there; it has ${text.length} characters.` : text} ${note}`
  if (turn.refused && !error?.retryable && error?.code !== 'closed') {
    box.value ||= turn.prompt
    grow()
  }
  if (error && GONE.includes(error.code) && !turn.refused && current) chat.open(current).catch(() => {})
  update()
  sidebar.share()
}

/** @param {Turn} turn */
function remove(turn) {
  turn.leave()
  turns.delete(turn.id)
}

/** What runs or waits here. */
const running = () => [...turns.values()].some(({ reply }) => reply && !reply.ended)

function stop() {
  for (const { reply } of turns.values()) reply?.stop()
}

// What is shown.

function update() {
  const busy = running()
  send.classList.toggle('stop', busy)
  send.setAttribute('aria-label', busy ? 'Stop' : 'Send')
  hint.hidden = turns.size > 0 || log.ariaBusy === 'true'
  showTitle()
}

function showTitle() {
  const title = current === undefined ? NEW : (sidebar.title(current) ?? told) || NEW
  if (heading.textContent !== title) heading.textContent = title
  document.title = current === undefined ? 'wsserver' : `${title} · wsserver`
}

/** @param {string} words @param {() => void} [again] */
function say(words, again) {
  const button = find(notice, 'button', HTMLButtonElement)
  find(notice, 'span', HTMLElement).textContent = words
  notice.hidden = !words
  button.hidden = !again
  button.onclick = again ?? null
}

// Where the reader is.

function toEnd() {
  scrollTo({ top: root.scrollHeight, behavior: 'instant' })
}

const left = () => root.scrollHeight - innerHeight - scrollY

addEventListener('scroll', () => {
  atEnd = scrollY < height ? atEnd && left() < 1 : atEnd || left() < NEAR
  height = scrollY
  jump.hidden = atEnd
}, { passive: true })

// Whatever grows, the end stays in view of who is there. This comes after layout and before paint.
const sizes = new ResizeObserver(() => {
  if (atEnd) toEnd()
})
sizes.observe(main)
addEventListener('resize', () => {
  if (atEnd) toEnd()
})

jump.addEventListener('click', () => {
  atEnd = jump.hidden = true
  toEnd()
  if (hovers.matches) box.focus()
})

// What the reader does.

function submit() {
  const text = box.value.toWellFormed?.() ?? box.value
  if (running() || !text.trim() || box.disabled) return
  box.value = ''
  grow()
  ask(text)
}

// Where a field does not grow by itself.
function grow() {
  if (CSS.supports('field-sizing', 'content')) return
  box.style.height = 'auto'
  box.style.height = `${box.scrollHeight}px`
}

form.addEventListener('submit', (event) => event.preventDefault())
send.addEventListener('click', (event) => {
  if (event.detail > 1) return // the second click of two must not stop what the first one sent
  if (running()) stop()
  else submit()
  if (hovers.matches) box.focus()
})
box.addEventListener('input', grow)
box.addEventListener('keydown', (event) => {
  // Safari ends a composition before the key that ended it, and tells by this code alone.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return
  event.preventDefault()
  submit()
})
addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented || document.querySelector('dialog[open]')) return
  if (document.body.classList.contains('listing')) drawer(false)
  else stop()
})
log.addEventListener('click', ({ target }) => {
  if (!(target instanceof Element)) return
  if (target.closest('summary')) { // what unfolds is what the reader wants to see, and not the end
    atEnd = false
    requestAnimationFrame(() => { atEnd = jump.hidden = left() < 1 })
  }
  const button = target.closest('.copy-code')
  if (button) copy(button.closest('figure')?.querySelector('code')?.textContent ?? '')
})
door.addEventListener('submit', (event) => {
  event.preventDefault()
  kept.token = token.value.trim()
  token.value = ''
  enter(kept.token)
  box.focus()
})
addEventListener('storage', ({ key, newValue }) => {
  if (key === 'token' && newValue && chat.state === 'unauthenticated') enter(newValue)
})
find(document, '#skip', HTMLElement).addEventListener('click', (event) => {
  event.preventDefault() // the hash is the conversation's
  box.focus()
})

// The list, which is a drawer where there is little room.

const narrow = matchMedia('(max-width: 52rem)')

/** @param {boolean} out */
function drawer(out) {
  const was = document.body.classList.contains('listing')
  document.body.classList.toggle('listing', out)
  menu.setAttribute('aria-expanded', String(out))
  side.inert = narrow.matches && !out
  main.inert = narrow.matches && out
  if (out) find(side, '#shut', HTMLElement).focus()
  else if (was) menu.focus()
}

menu.addEventListener('click', () => drawer(true))
find(document, '#shut', HTMLElement).addEventListener('click', () => drawer(false))
find(document, '#shade', HTMLElement).addEventListener('click', () => drawer(false))
narrow.addEventListener('change', () => drawer(false))
drawer(false)
side.addEventListener('click', (event) => {
  const link = event.target instanceof Element && event.target.closest('a')
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return
  if (link.id === 'new') { // with an address that has no hash
    event.preventDefault()
    if (current !== undefined) history.pushState(null, '', location.pathname + location.search)
    begin()
  }
  drawer(false)
  if (hovers.matches || link.id === 'new') box.focus({ preventScroll: true })
})

addEventListener('hashchange', route)
addEventListener('popstate', route)
addEventListener('visibilitychange', () => {
  if (document.visibilityState === 'visible' && chat.state === 'open') sidebar.refresh()
})
if (hovers.matches) box.focus()
route()
