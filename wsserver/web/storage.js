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
