/** Work in slices, one between two frames of the screen, so that the page always answers soon. */

const SLICE = 8 // milliseconds of work; layout of what it adds takes two or three times as long
const NO_FRAME = 100 // milliseconds until the next slice if the browser shows no frames, as for a hidden tab

/** @type {Set<() => void>} */
const jobs = new Set()
let end = 0 // of the slice
let isOpen = false

/** Whether the slice has time for more work. */
export function hasTime() {
  if (!isOpen) {
    isOpen = true
    end = performance.now() + SLICE
    afterFrame(next)
  }
  return performance.now() < end
}

/** Do a job in a later slice. The last one that was given is the first. @param {() => void} job */
export function doLater(job) {
  hasTime() // so that there is a later slice
  jobs.delete(job)
  jobs.add(job)
}

/** @param {() => void} job */
export function cancel(job) {
  jobs.delete(job)
}

/** Do work for each of a queue, in later slices. @template T @param {T[]} queue @param {(each: T) => void} work */
export function doEach(queue, work) {
  const next = () => {
    while (queue.length && hasTime()) work(/** @type {T} */ (queue.shift()))
    if (queue.length) doLater(next)
  }
  doLater(next)
}

function next() {
  isOpen = false
  while (jobs.size && hasTime()) {
    const job = /** @type {() => void} */ ([...jobs].at(-1))
    jobs.delete(job)
    job()
  }
}

/** @param {() => void} callback */
function afterFrame(callback) {
  const timer = setTimeout(() => {
    cancelAnimationFrame(frame)
    callback()
  }, NO_FRAME)
  const frame = requestAnimationFrame(() => {
    clearTimeout(timer)
    setTimeout(callback)
  })
}
