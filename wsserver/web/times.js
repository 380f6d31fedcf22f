/** Times of messages, and durations. */

import { find } from './dom.js'

const timeFormat = new Intl.DateTimeFormat(undefined, { timeStyle: 'short' })
const dateFormat = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' })
const fullFormat = new Intl.DateTimeFormat(undefined, { dateStyle: 'full', timeStyle: 'medium' })

/**
 * Show a time, without the date if it is today.
 * @param {HTMLElement} frame Has a `<time>`.
 * @param {number | undefined} seconds Unix time; undefined changes nothing.
 */
export function showTime(frame, seconds) {
  if (seconds === undefined) return
  const element = find(frame, 'time', HTMLTimeElement)
  const time = new Date(seconds * 1000)
  const isToday = time.toDateString() === new Date().toDateString()
  element.dateTime = time.toISOString()
  element.title = fullFormat.format(time)
  element.textContent = (isToday ? timeFormat : dateFormat).format(time)
  frame.hidden = false
}

/** Return a time with its date. @param {number} seconds Unix time. */
export const dateOf = (seconds) => dateFormat.format(seconds * 1000)

/** Return a duration in words. @param {number} seconds */
export function durationOf(seconds) {
  if (seconds < 1) return 'less than a second'
  const whole = Math.round(seconds)
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`
}
