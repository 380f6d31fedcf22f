/** The token of the user: the page asks for it, keeps it, and shares it with the other tabs. */

import { find } from './dom.js'
import { local, writeText } from './storage.js'

const form = find(document, '#login', HTMLFormElement)
const field = find(document, '#token', HTMLInputElement)

export class Login {
  /** @type {string | undefined} The token that this tab uses. */ token = local?.token

  /** @param {(token: string) => void} onToken Called with a token that the user enters, here or in another tab. */
  constructor(onToken) {
    this.onToken = onToken
    form.addEventListener('submit', (event) => {
      event.preventDefault()
      const token = field.value.trim()
      writeText('token', token)
      field.value = ''
      this.#use(token)
    })
    addEventListener('storage', ({ key, newValue }) => {
      if (key === 'token' && newValue && this.isShown) this.#use(newValue)
    })
  }

  get isShown() {
    return !form.hidden
  }

  /** Ask for a token, or hide the form. @param {boolean} shown */
  show(shown) {
    form.hidden = !shown
    if (shown) field.focus()
  }

  /** The server refuses the token: forget it, or use another one that another tab has. @returns {boolean} Whether another tab has one. */
  refuse() {
    const other = local?.token
    if (other !== undefined && other !== this.token) {
      this.#use(other)
      return true
    }
    this.token = undefined
    delete local?.token
    return false
  }

  /** @param {string} token */
  #use(token) {
    this.token = token
    this.onToken(token)
  }
}
