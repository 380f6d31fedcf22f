/**
 * Change nodes so that they equal others, and keep all that are equal: then a selection survives, and
 * nothing flickers.
 */

/**
 * Put nodes in the place of others.
 * @param {Element} parent
 * @param {ChildNode[]} before The last children of the parent.
 * @param {ChildNode[]} after
 * @returns {ChildNode[]} The nodes that are there now.
 */
export function patch(parent, before, after) {
  const result = after.map((node, place) => {
    const old = before[place]
    if (old === undefined) {
      parent.append(node)
      return node
    }
    if (same(old, node)) return old
    old.replaceWith(node)
    return node
  })
  for (const old of before.slice(after.length)) old.remove()
  return result
}

/** Change a node to equal another of the same kind. @param {ChildNode} old @param {ChildNode} node @returns {boolean} Whether that was possible. */
function same(old, node) {
  if (old instanceof Text && node instanceof Text) {
    if (old.data !== node.data) {
      if (node.data.startsWith(old.data)) old.appendData(node.data.slice(old.length))
      else old.data = node.data
    }
    return true
  }
  if (!(old instanceof HTMLElement && node instanceof HTMLElement) || old.localName !== node.localName) return false
  const { source } = /** @type {any} */ (old)
  if (source !== undefined || node.dataset.math !== undefined) return source === /** @type {any} */ (node).source
  if (old.localName === 'figure') return sameFigure(old, node)
  for (const { name } of [...old.attributes]) if (!node.hasAttribute(name)) old.removeAttribute(name)
  for (const { name, value } of node.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value)
  patch(old, [...old.childNodes], [...node.childNodes])
  return true
}

/** A reader may have wrapped or folded a code block, which stays so. @param {HTMLElement} old @param {HTMLElement} node */
function sameFigure(old, node) {
  const [from, to] = [node, old].map((figure) => figure.querySelector('code'))
  const [name, shown] = [node, old].map((figure) => figure.querySelector('.language')?.textContent)
  if (!from || !to || name !== shown) return false
  patch(to, [...to.childNodes], [...from.childNodes])
  return true
}
