// What the page uses of the libraries that format Markdown.
export { Lexer, Marked } from 'marked'
export { default as DOMPurify } from 'dompurify'
export { default as highlighter } from 'highlight.js/lib/common'
export { default as remend } from 'remend'
