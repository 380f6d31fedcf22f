/** The list of conversations: open, rename, delete, and more of them. */

import { copyOf, find } from './dom.js'

/** @typedef {import('./client.js').Chat} Chat */
/** @typedef {import('./client.js').Item} Item */

const PAGE = 30
const list = find(document, '#list', HTMLElement)
const more = find(document, '#more', HTMLButtonElement)
const trouble = find(document, '#trouble', HTMLElement)
const sure = find(document, '#sure', HTMLDialogElement)
const others = new BroadcastChannel('wsserver') // tabs of the same browser
const day = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' })

export class Sidebar {
  /** @type {Map<string, Item>} From the one used last. */ #items = new Map()
  /** @type {Map<string, HTMLElement>} */ #rows = new Map()
  /** @type {string | undefined} Where the next page begins. */ #next
  /** @type {Promise<void> | undefined} */ #asking
  #again = false
  /** @type {string | undefined} */ #current

  /**
   * @param {Chat} chat
   * @param {{changed: () => void, deleted: (id: string) => void}} told Whose titles may have
   *   changed; what is no longer there, whoever deleted it.
   */
  constructor(chat, told) {
    this.chat = chat
    this.told = told
    more.addEventListener('click', () => this.#loadMore())
    chat.on('renamed', () => this.refresh()) // by another browser
    chat.on('deleted', ({ conversation }) => this.#forget(conversation)) // by another browser
    others.addEventListener('message', ({ data }) => {
      if (typeof data === 'string') this.#forget(data)
      // A page that nobody sees and that rests is not to connect for this.
      if (chat.state !== 'idle' || document.visibilityState === 'visible') this.refresh()
    })
  }

  /** @param {string} id */
  title(id) {
    return this.#items.get(id)?.title
  }

  /** @param {string | undefined} id */
  select(id) {
    this.#current = id
    for (const [other, row] of this.#rows) this.#mark(other, row)
  }

  /** Let this browser's other tabs know that there is something new. @param {string} [deleted] */
  share(deleted) {
    others.postMessage(deleted)
    this.refresh()
  }

  /** Look again at what was used last. */
  refresh() {
    if (this.#asking) this.#again = true
    else this.#asking = this.#load().finally(() => {
      this.#asking = undefined
      if (this.#again) this.refresh()
      this.#again = false
    })
  }

  async #load() {
    try {
      const { items, next } = await this.chat.list({ limit: PAGE })
      const oldest = items.at(-1)?.updated ?? 0
      const seen = new Set(items.map(({ id }) => id))
      const older = next === undefined ? [] : [...this.#items.values()].filter(({ id, updated }) => !seen.has(id) && updated <= oldest)
      if (!older.length) this.#next = next
      this.#show([...items, ...older])
    } catch (error) {
      this.#complain(error)
    }
  }

  async #loadMore() {
    try {
      const { items, next } = await this.chat.list({ limit: PAGE, before: this.#next })
      this.#next = next
      const first = items.find(({ id }) => !this.#items.has(id))
      this.#show([...new Map([...this.#items.values(), ...items].map((item) => [item.id, item])).values()])
      if (first) this.#rows.get(first.id)?.querySelector('a')?.focus()
    } catch (error) {
      this.#complain(error)
    }
  }

  /** @param {unknown} error */
  #complain(error) {
    trouble.textContent = error instanceof Error ? error.message : String(error)
    trouble.hidden = false
  }

  /** Show what there is after all, and then why, as the list takes back what it complained of. @param {unknown} error */
  async #undo(error) {
    await this.#load()
    this.#complain(error)
  }

  /** @param {Item[]} items */
  #show(items) {
    this.#items = new Map(items.map((item) => [item.id, item]))
    const rows = items.map((item) => this.#row(item))
    for (const id of this.#rows.keys()) if (!this.#items.has(id)) this.#rows.delete(id)
    const renaming = list.querySelector('.renamed') // which would end if it moved
    if (!renaming && (rows.length !== list.children.length || rows.some((row, place) => row !== list.children[place]))) {
      const focused = document.activeElement
      list.replaceChildren(...rows)
      if (focused instanceof HTMLElement && list.contains(focused)) focused.focus({ preventScroll: true })
    }
    trouble.hidden = true
    more.hidden = this.#next === undefined
    this.told.changed()
  }

  /** @param {Item} item */
  #row({ id, title, updated }) {
    const row = this.#rows.get(id) ?? this.#newRow(id)
    const link = find(row, 'a', HTMLAnchorElement)
    link.textContent = title
    link.title = `${title}\n${day.format(updated * 1000)}`
    find(row, '.rename', HTMLElement).setAttribute('aria-label', `Rename “${title}”`)
    find(row, '.delete', HTMLElement).setAttribute('aria-label', `Delete “${title}”`)
    return row
  }

  /** @param {string} id */
  #newRow(id) {
    const row = copyOf('row')
    find(row, 'a', HTMLAnchorElement).href = `#${id}`
    find(row, '.rename', HTMLElement).addEventListener('click', () => this.#rename(id, row))
    find(row, '.delete', HTMLElement).addEventListener('click', () => this.#delete(id))
    this.#rows.set(id, row)
    this.#mark(id, row)
    return row
  }

  /** @param {string} id @param {HTMLElement} row */
  #mark(id, row) {
    const link = find(row, 'a', HTMLAnchorElement)
    if (id === this.#current) link.setAttribute('aria-current', 'page')
    else link.removeAttribute('aria-current')
  }

  /** Have the title's place taken by a field. @param {string} id @param {HTMLElement} row */
  #rename(id, row) {
    const field = document.createElement('input')
    Object.assign(field, { value: this.title(id) ?? '', maxLength: 200, ariaLabel: 'Title' })
    let over = false
    const leave = (/** @type {boolean} */ save, back = true) => {
      if (over) return
      over = true
      row.classList.remove('renamed')
      field.remove()
      if (back) find(row, 'a', HTMLElement).focus()
      const title = field.value.trim()
      if (save && title && title !== this.title(id)) this.#setTitle(id, title)
      else this.refresh()
    }
    field.addEventListener('keydown', (event) => {
      if (event.isComposing || event.keyCode === 229 || (event.key !== 'Enter' && event.key !== 'Escape')) return
      event.preventDefault()
      event.stopPropagation()
      leave(event.key === 'Enter')
    })
    field.addEventListener('blur', () => leave(true, false))
    row.classList.add('renamed')
    row.prepend(field)
    field.select()
  }

  /** @param {string} id @param {string} title */
  async #setTitle(id, title) {
    const item = this.#items.get(id)
    if (item) this.#show([...this.#items.values()].map((other) => (other === item ? { ...item, title } : other)))
    try {
      await this.chat.rename(id, title)
      this.share()
    } catch (error) {
      await this.#undo(error)
    }
  }

  /** @param {string} id */
  #delete(id) {
    find(sure, '#sure-text', HTMLElement).textContent = `“${this.title(id)}” will be gone for good.`
    sure.returnValue = ''
    sure.showModal()
    sure.addEventListener('close', async () => {
      if (sure.returnValue !== 'delete') return
      const row = this.#rows.get(id)
      const neighbour = row?.nextElementSibling ?? row?.previousElementSibling
      try {
        await this.chat.delete(id)
        this.#forget(id)
        this.share(id)
        find(neighbour ?? document, neighbour ? 'a' : '#new', HTMLElement).focus()
      } catch (error) {
        await this.#undo(error)
      }
    }, { once: true })
  }

  /** @param {string} id */
  #forget(id) {
    this.#show([...this.#items.values()].filter((item) => item.id !== id))
    this.told.deleted(id)
  }
}
