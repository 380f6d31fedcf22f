"""The parts of the page, and the actions of a user."""

import asyncio
import re

from playwright.async_api import Locator, Page, expect

import wsserver
from tests.support.puppet import BOUND, Puppet
from tests.support.sockets import sockets_of
from tests.support.tools import require_npm_package

SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONGEST_PAUSE = 15_000  # milliseconds between two attempts of the client's to connect
MARKUP = "<b>bold</b> <img src=x onerror=alert(1)> <script>alert(2)</script> &amp; [a](b)"


async def visit(page: Page, server: wsserver.Server) -> None:
    await page.goto(server.page)
    await expect(state(page)).to_have_text("Connected")


async def second_tab(page: Page, url: str = "") -> Page:
    tab = await page.context.new_page()
    await tab.goto(url or page.url)
    await expect(state(tab)).to_have_text("Connected")
    return tab


async def stop_clock(page: Page) -> None:
    await page.clock.pause_at(await page.evaluate("Date.now() / 1000 + 1"))


def state(page: Page) -> Locator:
    return page.locator("#state")


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your message")


def button(page: Page) -> Locator:
    return page.locator("#send")


async def idle(page: Page) -> None:
    """Wait until no reply is running."""
    await expect(button(page)).to_have_accessible_name("Send")


def reply(page: Page) -> Locator:
    return page.locator(".reply").last


def text(page: Page) -> Locator:
    return reply(page).locator(".text")


def note(page: Page) -> Locator:
    return reply(page).locator(".note")


def prompts(page: Page) -> Locator:
    return page.locator(".you p")


def queue(page: Page) -> Locator:
    """The prompts that have no reply and can be taken back."""
    return page.locator(".queue:visible")


def rows(page: Page) -> Locator:
    return page.get_by_role("navigation", name="Conversations").get_by_role("listitem")


def title(page: Page) -> Locator:
    return page.get_by_role("heading", level=1)


def alert(page: Page) -> Locator:
    return page.get_by_role("alert").locator("span")


async def ask(page: Page, prompt: str) -> None:
    await box(page).fill(prompt)
    await box(page).press("Enter")


async def converse(page: Page, puppet: Puppet, prompt: str, said: str = "Reply") -> None:
    """Send a prompt, and wait for the whole reply."""
    number = len(puppet.replies)
    await ask(page, prompt)
    (await puppet.reply(number)).say(said).end()
    await expect(text(page)).to_have_text(said)
    await idle(page)


def cut(server: wsserver.Server) -> None:
    """Abort all connections, as a failing network does."""
    for connection in tuple(server.listener.connections):
        connection.abort()


def dismiss(server: wsserver.Server, code: int, reason: str) -> None:
    """Close all connections with a close code."""
    for connection in sockets_of(server):
        connection.end(code, reason)


async def closed(event: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND):
        await event.wait()


async def rename(page: Page, name: str) -> None:
    """Rename the conversation that was used last."""
    row = rows(page).first
    await row.hover()
    await row.get_by_role("button", name=re.compile("^Rename")).click()
    field = page.get_by_role("textbox", name="Title")
    await expect(field).to_be_focused()
    await field.fill(name)
    await field.press("Enter")
    await expect(row.get_by_role("link")).to_be_focused()


async def violations(page: Page) -> list[str]:
    """Return the violations that axe-core finds."""
    source = (require_npm_package("axe-core") / "axe.min.js").read_text()
    await page.evaluate(f"() => {{ if (!globalThis.axe) {{ {source} }} }}")
    found = await page.evaluate("async () => (await axe.run()).violations")
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]
