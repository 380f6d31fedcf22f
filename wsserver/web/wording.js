/** Words about the end of a reply and its cost. */

import { meaningOf } from './errors.js'

/** @typedef {import('./client.js').Result} Result */

const PARTIAL = new Map(Object.entries({ // why a reply is incomplete: the cause of a stop, or `cut`
  client: 'Stopped.',
  disconnect: 'Stopped, because the connection was lost.',
  replaced: 'Stopped by a later message.',
  timeout: 'Stopped, because it took too long.',
  shutdown: 'Stopped, because the server shut down.',
  cut: 'Shortened, because it is too long to load again.',
}))
/** Why a prompt was not sent to the model. */
export const UNSENT_BY = new Map(Object.entries({
  client: 'Not sent.',
  disconnect: 'Not sent, because the connection was lost for too long.',
  replaced: 'Not sent, because a later message interrupted.',
}))
const numbers = new Intl.NumberFormat('en')

/** Whether `partial` of a history is the code of an error. @param {string} partial */
export const isFailure = (partial) => !PARTIAL.has(partial)

/** Return why a reply of a history is incomplete. @param {string} partial */
export const describePartial = (partial) => PARTIAL.get(partial) ?? meaningOf(partial)

/** Return how a reply ended; an empty text if it is whole. @param {Result} result */
export function describeEnd({ reason, by = '', saved }) {
  const unsaved = saved === false ? ' It could not be saved.' : ''
  if (reason === 'stopped') return (PARTIAL.get(by) ?? 'Stopped.') + unsaved
  if (reason === 'max_tokens') return `Ended at the maximum length.${unsaved}`
  const whole = ['end_turn', 'stop_sequence'].includes(reason)
  return ((whole ? '' : `Ended early: ${reason.replaceAll('_', ' ')}.`) + unsaved).trim()
}

/** @param {string | undefined} model @param {Record<string, any> | undefined} usage */
export function describeUsage(model, usage) {
  const parts = model === undefined ? [] : [model]
  if (usage) {
    const { input_tokens: uncached = 0, output_tokens: output = 0, estimated } = usage
    const input = uncached + (usage.cache_creation_input_tokens ?? 0) + (usage.cache_read_input_tokens ?? 0)
    if (input || output) parts.push(`${numbers.format(input)} tokens in, ${estimated ? 'about ' : ''}${numbers.format(output)} out`)
  }
  return parts.join(' · ')
}
