/** The bundle `built/math.js`. */
export function render(source: string, element: HTMLElement, options: object): void
