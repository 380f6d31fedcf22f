"""Every state of the page is accessible in every look: axe, sizes of targets, and the width.

``GALLERY=folder pytest tests/browser/test_states.py`` keeps a picture of each.
"""

import os
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import violations
from tests.browser.states import STATES, State, open_list, open_title
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

# Kind, width and height of the window; 640 pixels are 1280 at a zoom of 200 %.
LOOKS = [
    *(("light", 1280, 800), ("light", 640, 400), ("dark", 768, 1024), ("dark", 320, 640)),
    *(("forced", 1280, 800), ("touch", 390, 844)),
]
GALLERY = os.environ.get("GALLERY")
if GALLERY:
    LOOKS[:0] = [("light", 768, 1024), ("light", 320, 640), ("dark", 1280, 800)]
DRAWER = {"groups", "search", "search_without_result", "renaming"}

# What a pointer can hit and is too small or cut off; a link in a text has the height of its line.
TARGETS = """(smallest) => {
    const scope = document.querySelector('dialog[open]') ?? document.querySelector('.listing #side')
        ?? document.body
    const targets = scope.querySelectorAll('button, select, input, textarea, summary, nav a')
    return [...targets].flatMap((target) => {
        const shown = target.checkVisibility({ visibilityProperty: true })
            && getComputedStyle(target).pointerEvents !== 'none'
        if (!shown || target.closest('[inert]')) return []
        const { width, height, left, right } = target.getBoundingClientRect()
        const fits = Math.min(width, height) >= smallest && left >= 0 && right <= innerWidth
        return fits ? [] : [`${target.outerHTML.slice(0, 90)}: ${width} × ${height} at ${left}`]
    })
}"""


async def look(page: Page, name: str) -> None:
    """Check the page in every look."""
    faults: dict[str, list[str]] = {}
    devtools = await page.context.new_cdp_session(page)
    for kind, width, height in LOOKS:
        await page.emulate_media(
            color_scheme="dark" if kind == "dark" else "light",
            forced_colors="active" if kind == "forced" else "none",
            reduced_motion="reduce",
        )
        if kind == "touch":
            await devtools.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
        await page.set_viewport_size({"width": width, "height": height})
        if name in DRAWER:
            await open_list(page)
        if name == "renaming":
            await open_title(page)
        # The system chooses forced colours; axe takes those of the page for them.
        found = [
            fault
            for fault in await violations(page)
            if not (kind == "forced" and fault.startswith("color-contrast"))
        ]
        found += await page.evaluate(TARGETS, 40 if kind == "touch" else 24)
        if await page.evaluate("document.documentElement.scrollWidth") > width:
            found.append("scrolls sideways")
        if found:
            faults[f"{kind} {width}"] = found
        if GALLERY:
            await page.screenshot(path=Path(GALLERY, f"{name}-{kind}-{width}.png"))
    assert faults == {}


@pytest.mark.parametrize(("name", "reach"), STATES.items(), ids=STATES)
async def test_state_is_accessible_in_every_look(
    timed: Page, server: wsserver.Server, puppet: Puppet, name: str, reach: State
) -> None:
    await timed.clock.resume()
    await timed.set_viewport_size({"width": 1280, "height": 800})
    await reach(timed, server, puppet)
    await look(timed, name)


async def test_login_is_accessible_in_every_look(blank: Page, puppet: Puppet) -> None:
    async def named(_token: str | None, _: object) -> wsserver.Principal | None:
        return None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        await expect(blank.get_by_label("Your token")).to_be_focused()
        await look(blank, "login")
