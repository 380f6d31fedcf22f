/**
 * Change nodes so that they equal others, and keep all that are equal: then a selection survives, and
 * nothing flickers.
 */

/**
 * Put nodes in the place of others.
 * @param {Element} parent
 * @param {ChildNode[]} before Consecutive children of the parent; if there are none, the nodes become its last children.
 * @param {ChildNode[]} after
 * @returns {ChildNode[]} The nodes that are there now.
 */
export function patch(parent, before, after) {
  const kept = before.length === after.length ? [] : equalEnd(before, after)
  const from = before.slice(0, before.length - kept.length)
  const to = after.slice(0, after.length - kept.length)
  const next = kept[0] ?? before.at(-1)?.nextSibling ?? null
  const result = to.map((node, place) => {
    const old = from[place]
    if (old === undefined) {
      parent.insertBefore(node, next)
      return node
    }
    if (same(old, node)) return old
    old.replaceWith(node)
    return node
  })
  for (const old of from.slice(to.length)) old.remove()
  return [...result, ...kept]
}

/** Return the last nodes that equal the last ones of others. @param {ChildNode[]} before @param {ChildNode[]} after */
function equalEnd(before, after) {
  let length = 0
  while (length < Math.min(before.length, after.length) && isEqual(before[before.length - length - 1], after[after.length - length - 1])) length++
  return before.slice(before.length - length)
}

/** @param {any} old @param {any} node */
function isEqual(old, node) {
  return old.source === undefined ? old.isEqualNode(node) : old.source === node.source
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
