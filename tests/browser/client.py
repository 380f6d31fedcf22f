"""Calls of client.js on a page without scripts."""

from typing import Any

from playwright.async_api import Page

__all__ = ["ask", "connect", "end", "says", "state"]


async def connect(page: Page, url: str | None = None, **options: Any) -> None:
    await page.evaluate(
        """async ([url, options]) => {
            const { connect } = await import('/client.js');
            globalThis.chat = connect(url ?? undefined, options);
            globalThis.replies = [];
            globalThis.ask = (...given) => { replies.push(chat.prompt(...given)); };
        }""",
        [url, options],
    )


async def ask(page: Page, prompt: str, conversation: str | None = None) -> None:
    options = {} if conversation is None else {"conversation": conversation}
    await page.evaluate("given => ask(...given)", [prompt, options])


async def says(page: Page, text: str, number: int = 0) -> None:
    await page.wait_for_function("([n, text]) => replies[n].text === text", arg=[number, text])


async def state(page: Page, wanted: str) -> None:
    await page.wait_for_function("wanted => chat.state === wanted", arg=wanted)


async def end(page: Page, number: int = 0) -> Any:
    return await page.evaluate(
        "n => replies[n].done.then(({ reason }) => reason, ({ code }) => code)", number
    )
