/** The bundle `built/markdown.js`. All is undefined if the server was installed without npm. */
export const Lexer: any
export const Marked: any
export const DOMPurify: any
export function remend(text: string, options?: object): string
