// What the page uses of KaTeX. It loads this only for a reply with mathematics.
export { render } from 'katex'
