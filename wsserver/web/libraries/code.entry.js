// What the page uses of highlight.js. It loads this only for a reply with code.
export { default as highlighter } from 'highlight.js/lib/common'
