"""Editing of the last prompt, and another reply in place of the last one."""

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.page import ask, box, converse, idle, prompts, second_tab, text
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


def regenerate(page: Page) -> Locator:
    return page.get_by_role("button", name="Regenerate the reply")


def rewrite(page: Page) -> Locator:
    return page.get_by_role("button", name="Edit the message and send it again")


async def test_regenerate_replaces_last_complete_reply(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First", "One")
    await converse(page, puppet, "Second", "Two")
    await expect(regenerate(page)).to_have_count(1)  # of the last turn
    await regenerate(page).click()
    model = await puppet.reply(2)
    assert [m.content for m in model.request.messages] == ["First", "One", "Second"]
    model.say("Three").end()
    for _ in range(2):  # also in the history
        await expect(prompts(page)).to_have_text(["First", "Second"])
        await expect(text(page)).to_have_text("Three")
        await expect(regenerate(page)).to_have_count(1)
        await page.reload()


@pytest.mark.parametrize("way", ["key", "button"])
async def test_edited_prompt_replaces_last_turn_in_every_tab(
    page: Page, puppet: Puppet, way: str
) -> None:
    await converse(page, puppet, "First", "One")
    await converse(page, puppet, "Sceond", "Two")
    tab = await second_tab(page)
    await (box(page).press("ArrowUp") if way == "key" else rewrite(page).click())
    await expect(box(page)).to_be_focused()
    await expect(box(page)).to_have_value("Sceond")
    await ask(page, "Second")
    model = await puppet.reply(2)
    assert [m.content for m in model.request.messages] == ["First", "One", "Second"]
    model.say("Three").end()
    for each in (page, tab):
        await expect(prompts(each)).to_have_text(["First", "Second"])
        await expect(text(each)).to_have_text("Three")
    await expect(page.locator("#editing")).to_be_hidden()
    await converse(page, puppet, "Third", "Four")
    await expect(prompts(page)).to_have_text(["First", "Second", "Third"])


async def test_cancelled_edit_restores_draft_and_replaces_nothing(
    page: Page, puppet: Puppet
) -> None:
    await converse(page, puppet, "First", "One")
    await box(page).fill("A draft")
    await box(page).press("ArrowUp")  # moves the cursor
    await expect(box(page)).to_have_value("A draft")
    await rewrite(page).click()
    await expect(box(page)).to_have_value("First")
    await box(page).press("Escape")
    await expect(box(page)).to_have_value("A draft")
    await box(page).press("Enter")
    (await puppet.reply(1)).say("Two").end()
    await idle(page)
    await expect(prompts(page)).to_have_text(["First", "A draft"])


async def test_last_turn_cannot_be_replaced_while_reply_runs(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First", "One")
    await ask(page, "Second")
    model = (await puppet.reply(1)).say("Two")
    await expect(text(page)).to_have_text("Two")
    await expect(regenerate(page).or_(rewrite(page))).to_have_count(0)
    await box(page).press("ArrowUp")
    await expect(box(page)).to_have_value("")
    model.end()
    await idle(page)
