/** Groups of conversations by the day of their last use. */

const month = new Intl.DateTimeFormat('en', { month: 'long' })
const monthOfYear = new Intl.DateTimeFormat('en', { month: 'long', year: 'numeric' })

/**
 * Return the name of the group of a time, in the time zone of the browser.
 * @param {number} seconds Unix time.
 * @param {Date} [now]
 */
export function groupOf(seconds, now = new Date()) {
  const time = new Date(seconds * 1000)
  const from = (/** @type {number} */ days) => new Date(now.getFullYear(), now.getMonth(), now.getDate() - days)
  if (time >= from(0)) return 'Today'
  if (time >= from(1)) return 'Yesterday'
  if (time >= from(7)) return 'Previous 7 days'
  return (time.getFullYear() === now.getFullYear() ? month : monthOfYear).format(time)
}
