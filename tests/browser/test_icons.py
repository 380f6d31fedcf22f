"""The page can be installed as an app, and its PNG icons show the SVG icon of the manifest.

``UPDATE_ICONS=1 pytest tests/browser/test_icons.py`` writes the PNG files.
"""

import base64
import json
import os
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.async_api import Browser, async_playwright, expect

import wsserver
from tests.browser.page import SWITCHES, state
from tests.support.tools import ROOT, require_chromium

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

WEB = ROOT / "wsserver/web"
MANIFEST = json.loads((WEB / "manifest.webmanifest").read_text())
LARGEST_DIFFERENCE = """async (pictures) => {
    const [one, other] = await Promise.all(pictures.map(async (picture) => {
        const image = new Image()
        image.src = `data:image/png;base64,${picture}`
        await image.decode()
        const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d')
        canvas.drawImage(image, 0, 0)
        return canvas.getImageData(0, 0, image.width, image.height).data
    }))
    if (one.length !== other.length) return Infinity
    return one.reduce((most, value, place) => Math.max(most, Math.abs(value - other[place])), 0)
}"""


async def test_chromium_offers_to_install_page(server: wsserver.Server, tmp_path: Path) -> None:
    # Chromium checks nothing in an incognito window, which all other tests have.
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            tmp_path, executable_path=require_chromium(), args=SWITCHES
        )
        page = context.pages[0]
        await page.goto(server.page)
        await expect(state(page)).to_have_text("Connected")
        devtools = await context.new_cdp_session(page)
        manifest = await devtools.send("Page.getAppManifest")
        found = await devtools.send("Page.getInstallabilityErrors")
        icons = await page.evaluate(
            """(icons) => Promise.all(icons.map(async (icon) => {
                const image = new Image()
                image.src = icon
                await image.decode()
                return image.width
            }))""",
            [icon["src"] for icon in MANIFEST["icons"]] + ["icon-180.png"],
        )
        await context.close()
    assert manifest["url"] == f"{server.page}manifest.webmanifest"
    assert manifest["errors"] == []
    assert found["installabilityErrors"] == []
    assert icons == [192, 512, 512, 512, 180]


@pytest.mark.parametrize("size", [180, 192, 512])
async def test_png_icon_shows_svg_icon(browser: Browser, size: int) -> None:
    vector = next(icon["src"] for icon in MANIFEST["icons"] if icon["sizes"] == "any")
    page = await browser.new_page(viewport={"width": size, "height": size})
    markup = unquote(vector.partition(",")[2]).replace("512", str(size))
    await page.set_content(f"<style>body {{ margin: 0 }} svg {{ display: block }}</style>{markup}")
    drawn = await page.screenshot()
    path = WEB / f"icon-{size}.png"
    if os.environ.get("UPDATE_ICONS"):
        path.write_bytes(drawn)
    pictures = [base64.b64encode(each).decode() for each in (path.read_bytes(), drawn)]
    assert await page.evaluate(LARGEST_DIFFERENCE, pictures) < 64  # at the edges
    await page.close()
