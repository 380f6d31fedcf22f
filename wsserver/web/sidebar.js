/** The list of conversations: search, open, rename, delete, load more. */

import { cloneTemplate, find, isComposing } from './dom.js'
import { messageOf, referenceOf, showReference } from './errors.js'
import { groupOf } from './groups.js'
import { dateOf } from './times.js'

/** @typedef {import('./client.js').Chat} Chat */
/** @typedef {import('./client.js').Item} Item */

const PAGE_SIZE = 30
const PAUSE = 300 // milliseconds between two pages that load by themselves, because the server limits the frames per second
const list = find(document, '#list', HTMLElement)
const search = find(document, '#search', HTMLInputElement)
const matches = find(document, '#matches', HTMLElement)
const more = find(document, '#more', HTMLButtonElement)
const failure = find(document, '#list-error', HTMLElement)
const dialog = find(document, '#confirm', HTMLDialogElement)
const otherTabs = new BroadcastChannel('wsserver') // of this browser

export class Sidebar {
  /** @type {Map<string, Item>} The one used last first. */ #items = new Map()
  /** @type {Map<string, HTMLElement>} */ #rows = new Map()
  /** @type {Map<string, HTMLElement>} */ #groups = new Map()
  /** @type {string | undefined} The `before` of the next page. */ #next
  /** @type {Promise<void> | undefined} */ #loading
  #loadAgain = false
  #loadingMore = false
  /** Loads the next page when the reader, or a search, comes to the end of the list. */
  #end = new IntersectionObserver((entries) => { if (entries.at(-1)?.isIntersecting) this.#loadMore() })
  /** @type {string | undefined} */ #current

  /**
   * @param {Chat} chat
   * @param {{onChange: () => void, onDelete: (id: string, isOwn: boolean) => void}} listener `onChange`: the titles may
   *   have changed. `onDelete`: this page, or another client, deleted the conversation.
   */
  constructor(chat, listener) {
    this.chat = chat
    this.listener = listener
    more.addEventListener('click', () => this.#loadMore())
    this.#end.observe(more)
    search.addEventListener('input', () => this.#arrange())
    search.addEventListener('keydown', (event) => {
      if (event.key !== 'Escape' || isComposing(event) || !search.value) return
      event.preventDefault()
      search.value = ''
      this.#arrange()
    })
    chat.on('renamed', () => this.announce()) // by the server, or by another browser
    chat.on('deleted', ({ conversation }) => this.#forget(conversation)) // by another browser
    otherTabs.addEventListener('message', ({ data }) => {
      if (typeof data === 'string') this.#forget(data)
      // An idle page does not connect for this while it is hidden.
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

  /** Tell the other tabs of this browser to refresh the list. @param {string} [deleted] */
  announce(deleted) {
    otherTabs.postMessage(deleted)
    this.refresh()
  }

  /** Load the first page again. */
  refresh() {
    if (this.#loading) this.#loadAgain = true
    else this.#loading = this.#load().finally(() => {
      this.#loading = undefined
      if (this.#loadAgain) this.refresh()
      this.#loadAgain = false
    })
  }

  async #load() {
    try {
      const { items, next } = await this.chat.list({ limit: PAGE_SIZE })
      const oldest = items.at(-1)?.updated ?? 0
      const seen = new Set(items.map(({ id }) => id))
      const older = next === undefined ? [] : [...this.#items.values()].filter(({ id, updated }) => !seen.has(id) && updated <= oldest)
      if (!older.length) this.#next = next
      this.#show([...items, ...older])
    } catch (error) {
      this.#showFailure(error)
    }
  }

  async #loadMore() {
    if (this.#loadingMore) return
    this.#loadingMore = true
    try {
      const { items, next } = await this.chat.list({ limit: PAGE_SIZE, before: this.#next })
      this.#next = next
      const first = items.find(({ id }) => !this.#items.has(id))
      const isFocused = document.activeElement === more
      this.#show([...new Map([...this.#items.values(), ...items].map((item) => [item.id, item])).values()])
      if (isFocused && !search.value && first) this.#rows.get(first.id)?.querySelector('a')?.focus()
      else if (isFocused && more.hidden) search.focus()
      setTimeout(() => {
        this.#end.unobserve(more)
        this.#end.observe(more) // it may still be in view
      }, PAUSE)
    } catch (error) {
      this.#showFailure(error)
    } finally {
      this.#loadingMore = false
    }
  }

  /** @param {unknown} error */
  #showFailure(error) {
    find(failure, 'span', HTMLElement).textContent = messageOf(error)
    showReference(find(failure, 'button', HTMLButtonElement), referenceOf(error))
    failure.hidden = false
  }

  /** Load the list again after a failed change, and show the failure: loading hides it. @param {unknown} error */
  async #revert(error) {
    await this.#load()
    this.#showFailure(error)
  }

  /** @param {Item[]} items */
  #show(items) {
    this.#items = new Map(items.map((item) => [item.id, item]))
    for (const item of items) this.#row(item)
    for (const id of this.#rows.keys()) if (!this.#items.has(id)) this.#rows.delete(id)
    this.#arrange()
    failure.hidden = true
    this.listener.onChange()
  }

  /** Put the rows whose titles have the words of the search into groups. */
  #arrange() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean)
    const found = [...this.#items.values()].filter(({ title }) => words.every((word) => title.toLowerCase().includes(word)))
    const hasMore = this.#next !== undefined
    search.hidden = !this.#items.size && !words.length
    const number = `${found.length || 'No'} ${found.length === 1 ? 'title' : 'titles'}`
    matches.textContent = words.length ? `${number} found${hasMore ? ` in the newest ${this.#items.size}` : ''}.` : ''
    more.textContent = words.length ? 'Search older conversations' : 'Show older conversations'
    more.hidden = !hasMore
    if (list.querySelector('.renamed')) return // moving the row would end the editing
    const focused = document.activeElement
    /** @type {Map<string, HTMLElement[]>} */
    const groups = new Map()
    for (const { id, updated } of found) {
      const name = groupOf(updated)
      const row = this.#rows.get(id)
      if (row) groups.set(name, [...(groups.get(name) ?? []), row])
    }
    for (const [name, rows] of groups) replaceChildren(find(this.#group(name), 'ul', HTMLElement), rows)
    replaceChildren(list, [...groups.keys()].map((name) => this.#group(name)))
    if (!(focused instanceof HTMLElement) || focused === document.activeElement) return
    if (list.contains(focused)) focused.focus({ preventScroll: true })
    else search.focus({ preventScroll: true }) // the search no longer finds the row
  }

  /** @param {string} name */
  #group(name) {
    let group = this.#groups.get(name)
    if (group) return group
    group = cloneTemplate('group')
    find(group, 'h2', HTMLElement).textContent = name
    this.#groups.set(name, group)
    return group
  }

  /** @param {Item} item */
  #row({ id, title, updated }) {
    const row = this.#rows.get(id) ?? this.#newRow(id)
    const link = find(row, 'a', HTMLAnchorElement)
    link.textContent = title
    link.title = `${title}\n${dateOf(updated)}`
    find(row, '.rename', HTMLElement).setAttribute('aria-label', `Rename “${title}”`)
    find(row, '.delete', HTMLElement).setAttribute('aria-label', `Delete “${title}”`)
    return row
  }

  /** @param {string} id */
  #newRow(id) {
    const row = cloneTemplate('row')
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

  /** Replace the title with a text field. @param {string} id @param {HTMLElement} row */
  #rename(id, row) {
    const field = document.createElement('input')
    Object.assign(field, { value: this.title(id) ?? '', maxLength: 200, ariaLabel: 'Title', dir: 'auto' })
    let closed = false
    const close = (/** @type {boolean} */ save, refocus = true) => {
      if (closed) return
      closed = true
      row.classList.remove('renamed')
      field.remove()
      if (refocus) find(row, 'a', HTMLElement).focus()
      const title = field.value.trim()
      if (save && title && title !== this.title(id)) this.#setTitle(id, title)
      else this.refresh()
    }
    field.addEventListener('keydown', (event) => {
      if (isComposing(event) || (event.key !== 'Enter' && event.key !== 'Escape')) return
      event.preventDefault()
      event.stopPropagation()
      close(event.key === 'Enter')
    })
    field.addEventListener('blur', () => close(true, false))
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
      this.announce()
    } catch (error) {
      await this.#revert(error)
    }
  }

  /** @param {string} id */
  #delete(id) {
    find(dialog, '#confirm-text', HTMLElement).textContent = `“${this.title(id)}” will be deleted permanently.`
    dialog.returnValue = ''
    dialog.showModal()
    dialog.addEventListener('close', async () => {
      if (dialog.returnValue !== 'delete') return
      const row = this.#rows.get(id)
      const rows = [...list.querySelectorAll('li')]
      const place = rows.findIndex((other) => other === row)
      const neighbour = rows[place + 1] ?? rows[place - 1]
      try {
        await this.chat.delete(id)
        this.#forget(id, true)
        this.announce(id)
        find(neighbour ?? document, neighbour ? 'a' : '#new', HTMLElement).focus()
      } catch (error) {
        await this.#revert(error)
      }
    }, { once: true })
  }

  /** @param {string} id @param {boolean} [isOwn] Whether this page deleted it. */
  #forget(id, isOwn = false) {
    this.#show([...this.#items.values()].filter((item) => item.id !== id))
    this.listener.onDelete(id, isOwn)
  }
}

/** Replace the children of an element, if they are others. @param {HTMLElement} element @param {HTMLElement[]} children */
function replaceChildren(element, children) {
  const { children: present } = element
  if (children.length !== present.length || children.some((child, place) => child !== present[place])) element.replaceChildren(...children)
}
