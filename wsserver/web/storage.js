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

/** Return an object that `write` stored; an empty one if there is none. @param {Storage | undefined} storage @param {string} key @returns {Record<string, any>} */
export function read(storage, key) {
  try {
    const value = JSON.parse(storage?.getItem(key) ?? '{}')
    return typeof value === 'object' && value !== null ? value : {}
  } catch {
    return {}
  }
}

/** @param {Storage | undefined} storage @param {string} key @param {object | undefined} value Undefined deletes the key. */
export function write(storage, key, value) {
  try {
    if (value === undefined) storage?.removeItem(key)
    else storage?.setItem(key, JSON.stringify(value))
  } catch {
    // The storage is full: the value stays in the page.
  }
}

/** Delete the oldest objects, by their `at`, until at most `most` are left. @param {Storage | undefined} storage @param {string} prefix Of their keys. @param {number} most */
export function dropOldest(storage, prefix, most) {
  const keys = Object.keys(storage ?? {}).filter((key) => key.startsWith(prefix))
  if (keys.length <= most) return
  const ages = keys.map((key) => /** @type {const} */ ([key, Number(read(storage, key).at) || 0]))
  for (const [key] of ages.sort(([, a], [, b]) => a - b).slice(0, keys.length - most)) storage?.removeItem(key)
}
