/** The bundle `built/code.js`. */
export const highlighter: any
