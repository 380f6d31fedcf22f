/** Export of a conversation to a file, as Markdown or JSON. */

/** @typedef {import('./client.js').Chat} Chat */
/** @typedef {import('./client.js').Message} Message */

/**
 * Load all messages of a conversation, and save them to a file.
 * @param {Chat} chat
 * @param {string} id
 * @param {string} title
 * @param {'md' | 'json'} format
 */
export async function exportConversation(chat, id, title, format) {
  /** @type {Message[]} */
  const messages = []
  /** @type {number | undefined} */
  let before
  do {
    const page = await chat.open(id, { before: before ?? Number.MAX_SAFE_INTEGER })
    messages.unshift(...page.messages)
    before = page.before
  } while (before !== undefined)
  const text = format === 'md' ? toMarkdown(title, messages) : `${JSON.stringify({ conversation: id, title, messages }, undefined, 2)}\n`
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob([text], { type: format === 'md' ? 'text/markdown' : 'application/json' }))
  link.download = `${fileName(title)}.${format}`
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000)
}

/** @param {string} title @param {Message[]} messages */
function toMarkdown(title, messages) {
  const parts = messages.map(({ role, content, partial }) => `## ${role === 'user' ? 'You' : 'Reply'}\n\n${content}${partial ? `\n\n*Incomplete: ${partial}*` : ''}`)
  return `${[`# ${title}`, ...parts].join('\n\n')}\n`
}

/** @param {string} title */
function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, ' ').trim().slice(0, 60) || 'conversation'
}
