/** What a reader prefers in all conversations: the theme, and whether a wide page shows the list. */

import { find } from './dom.js'
import { local, writeText } from './storage.js'

const THEMES = ['system', 'light', 'dark']
const picker = find(document, '#theme', HTMLSelectElement)
const collapse = find(document, '#collapse', HTMLButtonElement)
const root = document.documentElement
const colors = [...document.querySelectorAll('meta[name=theme-color]')].map((meta) => ({ meta, color: meta.getAttribute('content') ?? '' }))

/** @param {string} theme */
function setTheme(theme) {
  root.dataset.theme = picker.value = THEMES.includes(theme) ? theme : 'system'
  const fixed = colors[['light', 'dark'].indexOf(theme)]?.color
  for (const { meta, color } of colors) meta.setAttribute('content', fixed ?? color)
}

/** Show or hide the list on a wide page. @param {boolean} hidden */
function hideList(hidden) {
  root.classList.toggle('collapsed', hidden)
  collapse.setAttribute('aria-expanded', String(!hidden))
}

picker.addEventListener('change', () => {
  setTheme(picker.value)
  writeText('theme', picker.value)
})
collapse.addEventListener('click', () => {
  const hidden = !root.classList.contains('collapsed')
  hideList(hidden)
  writeText('list', hidden ? 'hidden' : 'shown')
})
addEventListener('storage', ({ key, newValue }) => { // another tab changed it, or cleared the storage
  if (key === null || key === 'theme') setTheme(newValue ?? '')
})
setTheme(local?.getItem('theme') ?? '')
hideList(local?.getItem('list') === 'hidden')
