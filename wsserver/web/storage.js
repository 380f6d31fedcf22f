/** What the page keeps in the browser. Where the browser forbids storage, it lasts as long as the page. */

const MOST = 50 // conversations of which an object of one kind is kept; the oldest are dropped first

/** @param {() => Storage} get @returns {Storage | undefined} Undefined where the browser forbids it. */
function open(get) {
  try {
    return get()
  } catch {
    return undefined
  }
}

/** Shared by all tabs. */
export const local = open(() => localStorage)
/** Of this tab. It survives a reload. */
export const session = open(() => sessionStorage)

/** @type {Map<string, object>} What a full or forbidden storage did not take; it lasts as long as the page. */
const untaken = new Map()
/** @param {Storage | undefined} storage @param {string} key */
const nameOf = (storage, key) => `${storage === session ? 'session' : 'local'} ${key}`

/** Return an object that `write` stored; an empty one if there is none. @param {Storage | undefined} storage @param {string} key @returns {Record<string, any>} */
export function read(storage, key) {
  const kept = untaken.get(nameOf(storage, key))
  if (kept) return kept
  try {
    const value = JSON.parse(storage?.getItem(key) ?? '{}')
    return typeof value === 'object' && value !== null ? value : {}
  } catch {
    return {}
  }
}

/** @param {Storage | undefined} storage @param {string} key @param {object | undefined} value Undefined deletes the key. */
export function write(storage, key, value) {
  untaken.delete(nameOf(storage, key))
  try {
    storage?.removeItem(key) // an older value must not come back if the storage is full
    if (value !== undefined && !storage) throw new TypeError('no storage')
    if (value !== undefined) storage?.setItem(key, JSON.stringify(value))
  } catch {
    if (value !== undefined) untaken.set(nameOf(storage, key), value)
  }
}

/** Store a text for all tabs. A full storage keeps the old one. @param {string} key @param {string} text */
export function writeText(key, text) {
  try {
    local?.setItem(key, text)
  } catch { // the storage is full
  }
}

/** An object of each conversation, which all tabs share, and one of a new conversation, which belongs to its tab. */
export class PerConversation {
  /** @param {string} kind */
  constructor(kind) {
    this.prefix = `${kind} `
  }

  /** @param {string | undefined} conversation Undefined for a new one. */
  get(conversation) {
    return read(this.#place(conversation), this.prefix + (conversation ?? ''))
  }

  /** @param {string | undefined} conversation @param {object | undefined} value Undefined deletes the object. */
  set(conversation, value) {
    write(this.#place(conversation), this.prefix + (conversation ?? ''), value && { ...value, at: Date.now() })
    if (value && conversation !== undefined) this.#dropOldest()
  }

  #dropOldest() {
    const keys = Object.keys(local ?? {}).filter((key) => key.startsWith(this.prefix))
    if (keys.length <= MOST) return
    const ages = keys.map((key) => /** @type {const} */ ([key, Number(read(local, key).at) || 0]))
    for (const [key] of ages.sort(([, a], [, b]) => a - b).slice(0, keys.length - MOST)) local?.removeItem(key)
  }

  /** @param {string | undefined} conversation */
  #place(conversation) {
    return conversation === undefined ? session : local
  }
}
