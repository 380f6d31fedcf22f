"""Makes the README's pictures of the page during a reply.

``python -m tests.picture``, or ``make picture``.
"""

import asyncio
from pathlib import Path
from typing import Literal

from playwright.async_api import Browser, async_playwright, expect

import wsserver
from tests.support.client import client
from tests.support.tools import ROOT, require_chromium

LIGHT = ROOT / "examples/page.png"
DARK = ROOT / "examples/page-dark.png"
SIZE = 200_000  # maximum bytes of a picture
EARLIER = (
    "Regular expression for ISO dates",
    "A week in Lisbon with two children who like trains",
    "Why is the sky blue?",
    "Explain backpressure to a plumber",
)
PROMPT = "Tell me how a reply gets here, word by word"
UNTIL = "So this is a good"  # of the demo model's reply


async def main() -> None:
    async with async_playwright() as playwright:
        path = require_chromium()
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        await picture(browser, "light", LIGHT)
        await picture(browser, "dark", DARK)
        await browser.close()


async def picture(browser: Browser, scheme: Literal["light", "dark"], file: Path) -> None:
    """Open a conversation among others, and take the picture during its reply."""
    async with wsserver.serve("demo", demo_rate=60, port=0, drain_timeout=0) as server:
        async with client(server) as other:
            for number, prompt in enumerate(reversed(EARLIER)):
                start = await other.prompt(prompt, conversation=f"{number:016}")
                await other.send({"type": "stop"})
                await other.text(start["id"])
        page = await browser.new_page(
            color_scheme=scheme,
            reduced_motion="reduce",
            viewport={"width": 1000, "height": 640},
            device_scale_factor=1.5,
        )
        await page.goto(server.page)
        await page.locator("#prompt").fill(PROMPT)
        await page.locator("#prompt").press("Enter")
        await expect(page.locator(".text")).to_contain_text(UNTIL, timeout=20_000)
        taken = await page.screenshot(path=file)
        await page.close()
    assert len(taken) <= SIZE, f"{file.name} has {len(taken)} bytes"


if __name__ == "__main__":
    asyncio.run(main())
