/** Errors as sentences for people, and the reference that finds an error in the server's log. */

import { copy } from './dom.js'

/** The message of each error code: what happened, and what to do. The same as `Code.meaning` in errors.py. */
export const MEANINGS = /** @type {Record<string, string | null>} */ ({
  __proto__: null,
  invalid_json: 'The frame is not JSON.',
  invalid_frame: 'The frame is JSON, but not a frame of the protocol.',
  unknown_type: 'The protocol has no frame of this type.',
  too_long: 'The message is too long for this server. Shorten it.',
  id_conflict: 'Another prompt already has this id. Choose another id.',
  model_not_allowed: 'This server does not offer this model. Choose another one.',
  not_found: 'The server does not have this. It may have been deleted, or the address is wrong.',
  forgotten: 'The server has deleted this reply. Send the message again for a new one.',
  not_last: 'The conversation has continued, so this reply cannot be replaced. Load it again.',
  gap: 'The server lost a part of this reply. Load the conversation again to see the rest.',
  not_running: 'The reply has already ended, so there is nothing to stop.',
  unauthenticated: 'The token is missing, is not valid, or has expired. Enter a valid token.',
  busy: 'Another reply of this conversation is running. Wait for its end, or stop it.',
  limit: 'The server is at a limit. Wait a little, and try again.',
  quota: "Today's budget is used up. Try again tomorrow.",
  auth_unavailable: 'The server cannot check tokens now. Try again in a minute.',
  store: 'The server cannot read or save conversations now. Try again in a minute.',
  unavailable: 'Another part of the server does not answer. Try again in a moment.',
  shutting_down: 'The server is about to restart. Try again in a moment.',
  bad_request: "The model's provider refused the message. Change it, or begin a new conversation.",
  credentials: "The model's provider refused the server's key. Tell the operator of the server, with the reference of this error.",
  model_not_found: "The model's provider has no such model. Choose another one. Tell the operator of the server, with the reference of this error.",
  request_too_large: "The message is too large for the model's provider. Shorten it.",
  rate_limited: 'The model gets too many messages now. Wait a little, and try again.',
  prompt_too_long: 'The message is too long for the model. Shorten it.',
  spend_limit: "The server's account at the model's provider is at its limit. Tell the operator of the server, with the reference of this error.",
  upstream_error: "The model's provider has a failure. Try again in a moment.",
  overloaded: 'The model is overloaded. Wait a little, and try again.',
  unreachable: "The server cannot connect to the model's provider. Try again in a moment.",
  redirected: "The address of the model's provider has moved. Tell the operator of the server, with the reference of this error.",
  untrusted: "The certificate of the model's provider is not trusted. Tell the operator of the server, with the reference of this error.",
  timeout: 'The model was silent for too long. Try again.',
  incomplete: 'The reply broke off before its end. Try again.',
  malformed: "The server could not read the model's reply. Try again.",
  interrupted: 'The server crashed during the reply. Try again.',
  refusal: 'The model declined to answer. Ask in another way.',
  internal: 'The server failed. Try again. Tell the operator of the server, with the reference of this error.',
})

/** Return the sentence for an error code of a history, which has no message. @param {string} code */
export const meaningOf = (code) => MEANINGS[code] ?? `The reply failed (${code.replaceAll('_', ' ')}). Try again.`

/** @param {unknown} error */
export const messageOf = (error) => error instanceof Error ? error.message : String(error)

/** @param {unknown} error @returns {string | undefined} */
export const referenceOf = (error) => /** @type {Partial<import('./client.js').ReplyError>} */ (error).ref

/**
 * Show a button that copies the reference of an error. The operator of the server finds the error with it.
 * @param {HTMLButtonElement} button
 * @param {string | undefined} reference Undefined hides the button.
 */
export function showReference(button, reference) {
  button.hidden = !reference
  if (!reference) return
  button.title = 'Copy the reference for the operator of the server'
  button.value = reference // another error may use the button before it says its reference again
  const tell = (/** @type {boolean} */ copied) => { button.textContent = copied ? 'Reference copied' : `Reference ${button.value.slice(0, 8)}` }
  button.onclick = () => copy(reference, tell)
  tell(false)
}
