/** The storages of the browser; undefined where the browser forbids them. */

/** @param {() => Storage} get @returns {Storage | undefined} */
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

/** Delete the oldest objects, by their `at`, until at most `most` are left. @param {Storage | undefined} storage @param {string} prefix Of their keys. @param {number} most */
export function dropOldest(storage, prefix, most) {
  const keys = Object.keys(storage ?? {}).filter((key) => key.startsWith(prefix))
  if (keys.length <= most) return
  const ages = keys.map((key) => /** @type {const} */ ([key, Number(read(storage, key).at) || 0]))
  for (const [key] of ages.sort(([, a], [, b]) => a - b).slice(0, keys.length - most)) storage?.removeItem(key)
}
