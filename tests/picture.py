"""Makes the README's moving picture of the page: a reply, a failing network, a stop.

``python -m tests.picture``, or ``make picture``.
"""

import asyncio
import io
from collections.abc import AsyncIterator

from PIL import Image, ImageDraw, ImageFont
from playwright.async_api import Browser, Page, async_playwright, expect

import wsserver
from tests.support.line import Line
from tests.support.tools import ROOT, require_chromium

FILE = ROOT / "examples/page.webp"
SIZE = 500_000  # maximum bytes of the picture
PROMPT = "Tell me how a reply gets here, word by word"
WIDTH, HEIGHT, STRIP = 800, 500, 44  # pixels; the strip below the page says what happens
FRAMES = 6  # a second
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
STORY = """\
A reply is a **log of pieces** with numbers.

1. The model writes a piece, and the server appends it.
2. Your browser reads it over the WebSocket.
3. The network may fail here. The server goes on writing.

| piece | text |
|---:|---|
| 41 | ` the` |
| 42 | ` next` |
| 43 | ` word` |

When the browser is back, it asks for all *after piece 42*. Nothing is lost, and nothing comes \
twice.

And if you press Stop, the server closes the request to the model before it answers. No token \
costs money any more. This sentence goes on and on, to give you the time to press Stop, and on \
and on, and on and on, until you press Stop.
"""


async def main() -> None:
    async with async_playwright() as playwright:
        path = require_chromium()
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        await record(browser)
        await browser.close()


async def story(request: wsserver.Request) -> AsyncIterator[str]:
    words = STORY.split(" ")
    for word in words:
        yield f"{word} "
        await asyncio.sleep(0.07)


async def record(browser: Browser) -> None:
    """Take pictures during a reply whose network fails and comes back, and which is stopped."""
    frames: list[Image.Image] = []
    async with wsserver.serve(story, port=0, drain_timeout=0) as server, Line(server.port) as line:
        page = await browser.new_page(
            color_scheme="light", viewport={"width": WIDTH, "height": HEIGHT - STRIP}
        )
        await page.goto(line.url.replace("ws://", "http://"))
        await expect(page.locator("#state")).to_have_text("Connected")

        async def show(seconds: float, says: str) -> None:
            for _ in range(round(seconds * FRAMES)):
                began = asyncio.get_running_loop().time()
                await page.evaluate(PAINTED)  # else a picture may show half of a scroll
                frames.append(captioned(await page.screenshot(), says))
                spent = asyncio.get_running_loop().time() - began
                await asyncio.sleep(max(0.0, 1 / FRAMES - spent))

        await ask(page)
        await show(2.5, "The reply streams over a WebSocket.")
        line.cut()
        await show(1.5, "The network fails. The model goes on, because this is no stop.")
        line.mend()
        await page.evaluate("dispatchEvent(new Event('online'))")
        await expect(page.locator("#state")).to_have_text("Connected")
        await show(2.5, "The browser is back. The reply goes on after the last piece that arrived.")
        await page.locator("#send").click()
        await expect(page.locator(".note")).to_have_text("Stopped.")
        await show(2.0, "Stop. The request to the model is closed, and the text is kept.")
        await page.close()
    first, *rest = frames
    first.save(
        FILE,
        save_all=True,
        append_images=rest,
        duration=1000 // FRAMES,
        loop=0,
        quality=60,
        method=6,
    )
    taken = FILE.stat().st_size
    assert taken <= SIZE, f"{FILE.name} has {taken} bytes"


async def ask(page: Page) -> None:
    await page.locator("#prompt").fill(PROMPT)
    await page.locator("#prompt").press("Enter")


def captioned(screenshot: bytes, says: str) -> Image.Image:
    """Return a picture with a strip below it that says what happens."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "#20201f")
    image.paste(Image.open(io.BytesIO(screenshot)), (0, 0))
    ImageDraw.Draw(image).text(
        (WIDTH // 2, HEIGHT - STRIP // 2),
        says,
        fill="#ffffff",
        font=ImageFont.load_default(size=18),
        anchor="mm",
    )
    return image


if __name__ == "__main__":
    asyncio.run(main())
