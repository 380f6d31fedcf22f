"""Accessibility of the page: keyboard, screen reader, motion. For axe see test_states.py."""

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.page import (
    alert,
    ask,
    box,
    button,
    closed,
    converse,
    idle,
    text,
)
from tests.support.puppet import Puppet
from wsserver.errors import StoreError
from wsserver.stores.memory import MemoryStore

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_keyboard_reaches_everything(page: Page, puppet: Puppet) -> None:
    press = page.keyboard.press
    await expect(box(page)).to_be_focused()
    await page.keyboard.type("First")
    await press("Enter")
    (await puppet.reply()).say("line\n" * 100, "```\ncode\n```").end()
    await idle(page)

    async def back_to(target: Locator) -> None:
        for _ in range(20):
            if await target.evaluate("element => element === document.activeElement"):
                return
            await press("Shift+Tab")
        raise AssertionError(f"{target} is not to be reached")

    await back_to(page.get_by_role("link", name="Skip to your message"))
    await press("Enter")
    await expect(box(page)).to_be_focused()
    assert page.url.partition("#")[2] != "prompt"
    await back_to(page.get_by_role("button", name="Copy the reply"))
    await back_to(page.get_by_role("button", name="Copy the code"))
    await back_to(page.get_by_role("button", name="Delete “First”"))
    await press("Enter")
    await expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    await press("Enter")
    await back_to(page.get_by_role("button", name="Rename “First”"))
    await press("Enter")
    await page.keyboard.type("Mine")
    await press("Enter")
    await expect(page.get_by_role("link", name="Mine")).to_be_focused()
    await back_to(page.get_by_role("link", name="New conversation"))
    await press("Enter")
    await expect(box(page)).to_be_focused()
    await expect(page.locator("article")).to_have_count(0)
    await back_to(page.get_by_role("link", name="Mine"))
    await press("Enter")
    await expect(text(page)).to_contain_text("line")
    await page.keyboard.type("Second")
    await press("Tab")
    await expect(button(page)).to_be_focused()
    await press("Enter")
    model = await puppet.reply(1)
    await expect(button(page)).to_have_accessible_name("Stop")
    await press("Escape")
    await closed(model.closed)


async def listen(page: Page) -> None:
    """Collect what a screen reader announces."""
    await page.evaluate("""() => {
        globalThis.said = []
        const regions = '[role=status], [role=alert], [aria-live]'
        for (const region of document.querySelectorAll(regions)) {
            new MutationObserver(() => said.push(region.textContent))
                .observe(region, { childList: true, characterData: true, subtree: true })
        }
    }""")


async def announced(page: Page) -> list[str]:
    return [words.strip() for words in await page.evaluate("said")]


async def test_screen_reader_announces_whole_reply_once(page: Page, puppet: Puppet) -> None:
    await listen(page)
    await ask(page, "Count")
    model = await puppet.reply()
    for number in ("one ", "two ", "three"):
        model.say(number)
        await expect(text(page)).to_contain_text(number.strip())
    model.end()
    await idle(page)
    await expect(page.locator("#announcement")).to_have_text("one two three")
    assert await announced(page) == ["Sent.", "one two three"]
    live = page.locator("#log[aria-live], #log [aria-live], #log [role=log]")
    await expect(live).to_have_count(0)


async def test_reduced_motion_stops_animations(page: Page, puppet: Puppet) -> None:
    await page.emulate_media(reduced_motion="reduce")
    await ask(page, "Count")
    (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    assert await page.evaluate("document.getAnimations().length") == 0
    await page.emulate_media(reduced_motion="no-preference")
    assert await page.evaluate("document.getAnimations().length") > 0


async def test_refused_edit_is_announced_once_and_keeps_focus(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    await listen(page)
    await page.get_by_role("button", name="Edit the message").press("Enter")
    await expect(box(page)).to_be_focused()
    await ask(page, "x" * 40_000)
    await expect(alert(page)).to_contain_text("40,000 bytes")
    await expect(box(page)).to_be_focused()
    said = await announced(page)
    assert len([words for words in said if "40,000 bytes" in words]) == 1, said
    await page.locator("#editing").get_by_role("button", name="Cancel").press("Enter")
    await expect(box(page)).to_be_focused()


async def test_focus_goes_to_box_when_focused_button_disappears(
    page: Page, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> object:
        raise StoreError("disk")

    await converse(page, puppet, "First")
    await page.get_by_role("button", name="Regenerate").press("Enter")
    await expect(box(page)).to_be_focused()
    (await puppet.reply(1)).end()
    await idle(page)
    monkeypatch.setattr(MemoryStore, "load", broken)
    export = page.get_by_role("button", name="Export the conversation")
    await export.press("Enter")
    await page.keyboard.press("Escape")
    await expect(export).to_be_focused()
    await export.press("Enter")
    await page.get_by_role("button", name="JSON").press("Enter")
    again = page.get_by_role("button", name="Try again")
    await expect(again).to_be_visible()
    monkeypatch.undo()
    async with page.expect_download():
        await again.press("Enter")
    await expect(again).to_be_hidden()
    await expect(box(page)).to_be_focused()
