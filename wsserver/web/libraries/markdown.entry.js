// What the page uses of the libraries that format Markdown.
export { Lexer, Marked } from 'marked'
export { default as DOMPurify } from 'dompurify'
export { default as remend } from 'remend'
