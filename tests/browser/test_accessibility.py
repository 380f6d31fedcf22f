"""Accessibility of the page: keyboard, screen reader, motion. For axe see test_states.py."""

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.page import (
    ask,
    box,
    button,
    closed,
    idle,
    text,
)
from tests.support.puppet import Puppet

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


async def test_screen_reader_announces_whole_reply_once(page: Page, puppet: Puppet) -> None:
    await page.evaluate("""() => {
        globalThis.said = []
        const regions = '[role=status], [role=alert], [aria-live]'
        for (const region of document.querySelectorAll(regions)) {
            new MutationObserver(() => said.push(region.textContent))
                .observe(region, { childList: true, characterData: true, subtree: true })
        }
    }""")
    await ask(page, "Count")
    model = await puppet.reply()
    for number in ("one ", "two ", "three"):
        model.say(number)
        await expect(text(page)).to_contain_text(number.strip())
    model.end()
    await idle(page)
    await expect(page.locator("#announcement")).to_have_text("one two three")
    assert [words.strip() for words in await page.evaluate("said")] == ["Sent.", "one two three"]
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
