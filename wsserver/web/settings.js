/** The settings of a conversation: model, system prompt and temperature; and their dialog. */

import { find } from './dom.js'
import { showNotice } from './notice.js'
import { local, PerConversation, read, write } from './storage.js'

/** @typedef {{model?: string, system?: string, temperature?: number}} Values Undefined where the server's default holds. */

const MODEL = 'model' // the key of the model that was chosen last
const DEFAULT = 'the default'

const button = find(document, '#settings', HTMLButtonElement)
const label = find(button, 'span', HTMLElement)
const dialog = find(document, '#settings-dialog', HTMLDialogElement)
const modelField = find(dialog, '.field:has(#model)', HTMLElement)
const picker = find(dialog, '#model', HTMLSelectElement)
const system = find(dialog, '#system', HTMLTextAreaElement)
const slider = find(dialog, '#temperature', HTMLInputElement)
const shownTemperature = find(dialog, 'output', HTMLOutputElement)
const reset = find(dialog, '.reset', HTMLButtonElement)
const MIDDLE = slider.value

/**
 * Each conversation has its settings, and so has a new conversation in its tab. All tabs share the settings
 * of conversations. A change is kept at once.
 */
export class Settings {
  #kept = new PerConversation('settings')
  /** @type {string | undefined} The conversation; undefined for a new one. */ #conversation
  /** @type {Values} */ #values = {}
  /** @type {string[]} The models that the server offers, the default first. */ #models = []

  constructor() {
    button.addEventListener('click', () => {
      this.#fill()
      dialog.showModal()
    })
    picker.addEventListener('change', () => {
      write(local, MODEL, { name: picker.value })
      this.#set({ model: picker.value })
    })
    system.addEventListener('input', () => this.#set({ system: system.value.trim() ? (system.value.toWellFormed?.() ?? system.value) : undefined }))
    slider.addEventListener('input', () => this.#set({ temperature: slider.valueAsNumber }))
    slider.addEventListener('pointerup', () => this.#set({ temperature: slider.valueAsNumber })) // also a click that does not move it
    reset.addEventListener('click', () => {
      this.#set({ system: undefined, temperature: undefined })
      this.#fill()
      system.focus()
    })
    addEventListener('storage', ({ key }) => { // another tab changed it, or cleared the storage
      if ((key === null || key === this.#kept.prefix + this.#conversation) && !dialog.open) this.open(this.#conversation)
    })
  }

  /** Show the settings of a conversation. @param {string | undefined} conversation Undefined for a new one. */
  open(conversation) {
    this.#conversation = conversation
    const { model, system, temperature } = this.#kept.get(conversation)
    const { name } = conversation === undefined ? read(local, MODEL) : {}
    this.#values = {
      model: typeof (model ?? name) === 'string' ? (model ?? name) : undefined,
      system: typeof system === 'string' ? system : undefined,
      temperature: temperature >= 0 && temperature <= 2 ? temperature : undefined,
    }
    this.#dropModel()
    this.#show()
  }

  /** Keep the settings of a new conversation, which begins. @param {string} conversation */
  moveTo(conversation) {
    this.#kept.set(undefined, undefined)
    this.#conversation = conversation
    this.#set({})
  }

  /** Delete the settings of a conversation that was deleted. @param {string} conversation */
  delete(conversation) {
    this.#kept.set(conversation, undefined)
  }

  /** Keep the settings of a conversation that the server does not have, for a new one. @param {string} conversation */
  giveToNew(conversation) {
    this.#kept.set(undefined, this.#kept.get(conversation))
    this.delete(conversation)
  }

  /** @param {string[]} models What the server offers, the default first. */
  set models(models) {
    this.#models = models
    picker.replaceChildren(...models.map((name) => new Option(name)))
    this.#dropModel()
    if (dialog.open) this.#fill()
    this.#show()
  }

  /** What the next prompt sends. @returns {Values} */
  get values() {
    const { model, system, temperature } = this.#values
    return { model: this.#offers(model) ? model : undefined, system, temperature }
  }

  /** Whether a prompt can choose a model. Before the server has told its models, it may know all names. @param {string | undefined} model */
  #offers(model) {
    return !this.#models.length || (this.#models.length > 1 && this.#models.includes(model ?? ''))
  }

  /** Tell once that the server no longer offers the model that was chosen. */
  #dropModel() {
    const { model } = this.#values
    if (model === undefined || !this.#models.length || this.#models.includes(model)) return
    if (this.#conversation === undefined) write(local, MODEL, undefined)
    this.#set({ model: undefined })
    showNotice(`The server no longer offers the model “${model}”. Your next message goes to “${this.#models[0]}”.`)
  }

  /** @param {Values} changed */
  #set(changed) {
    const values = { ...this.#values, ...changed }
    this.#values = values
    const isDefault = Object.values(values).every((value) => value === undefined)
    this.#kept.set(this.#conversation, isDefault ? undefined : values)
    this.#show()
  }

  /** Show the values in the dialog. */
  #fill() {
    const { model, system: text = '', temperature } = this.values
    modelField.hidden = this.#models.length < 2
    picker.value = model ?? this.#models[0] ?? ''
    system.value = text
    slider.value = temperature === undefined ? MIDDLE : String(temperature)
  }

  /** Show on the button, and beside the temperature, what differs from the defaults. */
  #show() {
    const { model, system: text, temperature } = this.values
    const name = this.#models.length > 1 ? (model ?? this.#models[0]) : ''
    const changed = [text === undefined ? '' : 'system prompt', temperature === undefined ? '' : `temperature ${temperature}`].filter(Boolean)
    label.textContent = name || 'Settings'
    button.classList.toggle('changed', changed.length > 0)
    const parts = ['Settings', name && `model ${name}`, ...changed].filter(Boolean)
    button.ariaLabel = parts.length > 1 ? `${parts[0]}: ${parts.slice(1).join(', ')}` : 'Settings'
    button.title = changed.length ? `Changed: ${changed.join(', ')}` : ''
    shownTemperature.textContent = temperature === undefined ? DEFAULT : String(temperature)
    slider.setAttribute('aria-valuetext', temperature === undefined ? DEFAULT : String(temperature))
    slider.classList.toggle('unset', temperature === undefined)
    reset.hidden = !changed.length
  }
}
