/** Texts that are typed and not answered yet. They survive a reload and a crash of the tab. */

import { PerConversation, read, session, write } from './storage.js'

const UNSENT = 'unsent ' // + the conversation: the keys of prompts without a reply

/** @typedef {{id: string, draft: string}} Edit The turn that a draft replaces, and the draft before it. */

/**
 * One draft for each conversation, and one for a new conversation. All tabs share the drafts of
 * conversations. The draft of a new conversation belongs to its tab, and so do the prompts that were sent
 * and have no reply: they wait, or never reached the server.
 */
export class Drafts {
  #drafts = new PerConversation('draft')

  /** @param {string | undefined} conversation @returns {string} */
  get(conversation) {
    const { text = '' } = this.#drafts.get(conversation)
    return typeof text === 'string' ? text : ''
  }

  /** Return what the draft replaces. @param {string | undefined} conversation @returns {Edit | undefined} */
  getEdit(conversation) {
    const { edit } = this.#drafts.get(conversation)
    return typeof edit?.id === 'string' && typeof edit.draft === 'string' ? edit : undefined
  }

  /** @param {string | undefined} conversation @param {string} text @param {Edit} [edit] */
  set(conversation, text, edit) {
    this.#drafts.set(conversation, text.trim() ? { text, edit } : undefined)
  }

  /** Keep a prompt that was sent until it has a reply. @param {string} conversation @param {string} id @param {string} text */
  keepUnsent(conversation, id, text) {
    write(session, UNSENT + conversation, { ...read(session, UNSENT + conversation), [id]: text })
  }

  /** @param {string | undefined} conversation A new one has no prompts. @param {string} id */
  dropUnsent(conversation, id) {
    const { [id]: dropped, ...others } = read(session, UNSENT + conversation)
    if (dropped !== undefined) write(session, UNSENT + conversation, Object.keys(others).length ? others : undefined)
  }

  /**
   * Move the prompts that the server does not have into a draft, after a reload.
   * @param {string} conversation
   * @param {string | undefined} target The conversation of the draft; undefined for a new one.
   * @param {(id: string) => boolean} isKnown Whether the server has a prompt.
   * @returns {boolean} Whether there were any.
   */
  restoreUnsent(conversation, target, isKnown) {
    const lost = Object.entries(read(session, UNSENT + conversation)).filter(([id, text]) => !isKnown(id) && typeof text === 'string')
    write(session, UNSENT + conversation, undefined)
    const drafts = new Set([conversation, target]) // a conversation that the server never had passes its draft on
    const texts = [...lost.map(([, text]) => text), ...[...drafts].map((each) => this.get(each))]
    if (lost.length) this.set(target, texts.filter(Boolean).join('\n\n'))
    return lost.length > 0
  }

  /** Delete everything of a conversation that was deleted. @param {string} conversation */
  delete(conversation) {
    this.set(conversation, '')
    write(session, UNSENT + conversation, undefined)
  }
}
