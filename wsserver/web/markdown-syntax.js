/** Additions to the syntax of `marked`: mathematics and footnotes; and the HTML of some blocks. */

const INLINE_MATH = /^(?:\$\$([^$]+?)\$\$|\$(?![\s$])((?:\\.|[^$\\\n])*?(?:\\.|[^$\\\s]))\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\])/s
const BLOCK_MATH = /^(?:\$\$([^$]+?)\$\$|\\\[(.+?)\\\])[ \t]*(?:\n|$)/s
const NOTE = /^\[\^([^\]\s]{1,40})\]:[ \t]*([^\n]*(?:\n+(?: {2,}|\t)[^\n]+)*)(?:\n|$)/
const REFERENCE = /^\[\^([^\]\s]{1,40})\]/

// Tags without attributes; any other tag is text.
const TAG = /^<\/?(?:b|br|del|details|em|i|ins|kbd|mark|p|s|strong|sub|summary|sup|u|var) *\/?>$/i

/** @param {string} text */
function escape(text) {
  return text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;').replace(/"/g, '&quot;')
}

/** @param {string} kind @param {RegExp} pattern @param {string} level @param {RegExp} begins */
function mathematics(kind, pattern, level, begins) {
  return {
    name: `${kind}-math`,
    level,
    /** @param {string} source */
    start: (source) => {
      const place = source.search(begins)
      return place < 0 ? undefined : place
    },
    /** @param {string} source */
    tokenizer: (source) => {
      const match = pattern.exec(source)
      if (!match) return undefined
      const [raw, ...groups] = match
      const text = (groups.find((group) => group !== undefined) ?? '').trim()
      const shown = kind === 'block' || raw.startsWith('$$') || raw.startsWith('\\[') ? 'block' : 'inline'
      return { type: `${kind}-math`, raw, text, shown }
    },
    /** @param {{text: string, shown: string}} token */
    renderer: ({ text, shown }) => {
      const span = `<span data-math="${shown}">${escape(text)}</span>`
      return kind === 'block' ? `<p>${span}</p>` : span
    },
  }
}

/** @type {any} Extensions and renderers for `marked`. */
export const extensions = {
  extensions: [
    mathematics('block', BLOCK_MATH, 'block', /(?:^|\n)(?:\$\$|\\\[)/),
    mathematics('inline', INLINE_MATH, 'inline', /\$|\\\(|\\\[/),
    {
      name: 'note',
      level: 'block',
      /** @param {string} source */
      tokenizer(source) {
        const match = NOTE.exec(source)
        if (!match) return undefined
        const [raw, name, text] = match
        // @ts-ignore: `this` is the lexer's
        return { type: 'note', raw, name, tokens: this.lexer.inlineTokens(text.replace(/\n\s+/g, ' ')) }
      },
      /** @param {{name: string, tokens: any[]}} token */
      renderer({ name, tokens }) {
        // @ts-ignore: `this` is the parser's
        return `<p data-note="${escape(name)}"><sup><a data-ref="${escape(name)}"></a></sup> ${this.parser.parseInline(tokens)}</p>`
      },
    },
    {
      name: 'reference',
      level: 'inline',
      /** @param {string} source */
      start: (source) => {
        const place = source.indexOf('[^')
        return place < 0 ? undefined : place
      },
      /** @param {string} source */
      tokenizer: (source) => {
        const match = REFERENCE.exec(source)
        return match ? { type: 'reference', raw: match[0], name: match[1] } : undefined
      },
      /** @param {{name: string}} token */
      renderer: ({ name }) => `<sup><a data-ref="${escape(name)}"></a></sup>`,
    },
  ],
  renderer: {
    /** @param {{text: string, lang?: string}} token */
    code: ({ text, lang = '' }) => `<pre data-language="${escape(lang.split(/\s/, 1)[0])}"><code>${escape(text)}\n</code></pre>`,
    br: () => '<br>\n',
    /** @param {{text: string}} token */
    html: ({ text }) => text.split(/(<[^<>]*>)/).map((part) => (TAG.test(part) ? part : escape(part))).join(''),
    /** The page uses the levels 1 and 2 itself. @param {{depth: number, tokens: any[]}} token */
    heading({ depth, tokens }) {
      const level = Math.min(6, depth + 2)
      // @ts-ignore: `this` is the renderer's
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`
    },
  },
}
