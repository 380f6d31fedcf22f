"""Editing of the last prompt, and another reply in place of the last one."""

import pytest
from playwright.async_api import Locator, Page, expect

import wsserver
from tests.browser.page import (
    LONGEST_PAUSE,
    alert,
    ask,
    box,
    converse,
    cut,
    idle,
    note,
    prompts,
    second_tab,
    state,
    stop_clock,
    text,
    visit,
)
from tests.support.client import client
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


@pytest.mark.parametrize("way", ["reload", "navigation"])
async def test_edit_continues_after_page_was_left(page: Page, puppet: Puppet, way: str) -> None:
    await converse(page, puppet, "First", "One")
    await box(page).fill("A draft")
    await rewrite(page).click()
    await box(page).fill("My edit")
    if way == "reload":
        await page.reload()
    else:
        await page.get_by_role("link", name="New conversation").click()
        await expect(box(page)).to_have_value("")
        await expect(page.locator("#editing")).to_be_hidden()
        await page.go_back()
    await expect(page.locator("#editing")).to_be_visible()
    await ask(page, "My edit, changed")
    (await puppet.reply(1)).say("Two").end()
    await expect(prompts(page)).to_have_text(["My edit, changed"])
    await expect(box(page)).to_have_value("A draft")


async def test_edit_that_was_overtaken_while_page_was_closed_is_a_draft(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First", "One")
    url = page.url
    await box(page).fill("A draft")
    await rewrite(page).click()
    await box(page).fill("My edit")
    await page.goto("about:blank")
    async with client(server) as other:
        start = await other.prompt("Meanwhile", conversation=url.partition("#")[2])
        (await puppet.reply(1)).say("Two").end()
        await other.text(start["id"])
    await page.goto(url)
    await expect(prompts(page)).to_have_text(["First", "Meanwhile"])
    await expect(box(page)).to_have_value("My edit\n\nA draft")
    await expect(page.locator("#editing")).to_be_hidden()


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


async def lose_connection(page: Page, server: wsserver.Server) -> None:
    await stop_clock(page)
    cut(server)
    await expect(state(page)).to_have_text("Not connected, trying again…")


async def regain_connection(page: Page) -> None:
    await page.clock.fast_forward(LONGEST_PAUSE)
    await page.clock.resume()
    await expect(state(page)).to_have_text("Connected")


async def test_edit_without_connection_replaces_turn_after_reconnect(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First", "One")
    await lose_connection(timed, server)
    await box(timed).press("ArrowUp")
    await ask(timed, "Second")
    await expect(note(timed)).to_have_text("Not sent yet.")
    await regain_connection(timed)
    model = await puppet.reply(1)
    assert [m.content for m in model.request.messages] == ["Second"]
    model.say("Two").end()
    await expect(prompts(timed)).to_have_text(["Second"])
    await expect(text(timed)).to_have_text("Two")


async def test_edit_without_connection_that_was_overtaken_gives_text_back(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First", "One")
    conversation = timed.url.partition("#")[2]
    await lose_connection(timed, server)
    async with client(server) as other:
        start = await other.prompt("Meanwhile", conversation=conversation)
        (await puppet.reply(1)).say("Two").end()
        await other.text(start["id"])
    await box(timed).press("ArrowUp")
    await ask(timed, "My long edit")
    await box(timed).fill("A draft")
    await regain_connection(timed)
    await expect(box(timed)).to_have_value("My long edit\n\nA draft")
    await expect(alert(timed)).to_contain_text("The conversation went on")
    await expect(alert(timed)).to_contain_text("Your text is in the box.")
    await expect(prompts(timed)).to_have_text(["First", "Meanwhile"])
    await expect(timed.locator(".text")).to_have_text(["One", "Two"])
    await timed.reload()
    await expect(box(timed)).to_have_value("My long edit\n\nA draft")


async def test_turn_replaced_while_page_was_away_disappears(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First", "One")
    await converse(timed, puppet, "Sceond", "Two")
    conversation = timed.url.partition("#")[2]
    await lose_connection(timed, server)
    async with client(server) as other:
        await other.send({"type": "open", "conversation": conversation})
        last = (await other.next("history"))["messages"][-1]["id"]
        start = await other.prompt("Second", conversation=conversation, retry_of=last)
        (await puppet.reply(2)).say("Three").end()
        await other.text(start["id"])
    await regain_connection(timed)
    await expect(prompts(timed)).to_have_text(["First", "Second"])
    await expect(timed.locator(".text")).to_have_text(["One", "Three"])


async def test_long_absence_shows_newest_turns_and_offers_earlier_ones(
    blank: Page, puppet: Puppet
) -> None:
    await blank.clock.install()
    async with wsserver.serve(puppet, port=0, drain_timeout=0, history_messages=2) as server:
        await visit(blank, server)
        await converse(blank, puppet, "Prompt 0")
        conversation = blank.url.partition("#")[2]
        await lose_connection(blank, server)
        async with client(server) as other:
            for number in range(1, 5):
                start = await other.prompt(f"Prompt {number}", conversation=conversation)
                (await puppet.reply(number)).say("Reply").end()
                await other.text(start["id"])
        await regain_connection(blank)
        await expect(prompts(blank)).to_have_text(["Prompt 3", "Prompt 4"])
        earlier = blank.get_by_role("button", name="Show earlier messages")
        await earlier.click()
        await expect(prompts(blank)).to_have_count(4)
        await earlier.click()
        await expect(prompts(blank)).to_have_text([f"Prompt {number}" for number in range(5)])
        await expect(earlier).to_be_hidden()


@pytest.mark.parametrize("how", ["edit", "prompt"])
async def test_edit_overtaken_by_another_tab_keeps_text(
    page: Page, puppet: Puppet, how: str
) -> None:
    await converse(page, puppet, "First", "One")
    tab = await second_tab(page)
    await box(page).fill("A draft")
    await rewrite(page).click()
    await box(page).fill("My long edit")
    if how == "edit":
        await rewrite(tab).click()
    await ask(tab, "Other")
    (await puppet.reply(1)).say("Two").end()
    await idle(tab)
    await expect(page.locator("#editing")).to_be_hidden()
    await expect(box(page)).to_have_value("My long edit\n\nA draft")
    await expect(alert(page)).to_contain_text("Your text is in the box.")
    said = ["Other"] if how == "edit" else ["First", "Other"]
    await expect(prompts(page)).to_have_text(said)
    await box(page).press("Enter")
    (await puppet.reply(2)).say("Three").end()
    await expect(prompts(page)).to_have_text([*said, "My long edit\n\nA draft"])


async def test_unchanged_edit_ends_silently_when_another_tab_overtakes_it(
    page: Page, puppet: Puppet
) -> None:
    await converse(page, puppet, "First", "One")
    tab = await second_tab(page)
    await rewrite(page).click()
    await converse(tab, puppet, "Second", "Two")
    await expect(page.locator("#editing")).to_be_hidden()
    await expect(box(page)).to_have_value("")
    await expect(alert(page)).to_be_hidden()


async def test_edit_that_server_refuses_can_be_mended(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First", "One")
    await box(page).press("ArrowUp")
    await ask(page, "x" * 40_000)  # over the prompt_size
    await expect(alert(page)).to_contain_text("The prompt has 40,000 bytes")
    await expect(box(page)).to_have_value("x" * 40_000)
    await expect(page.locator("#editing")).to_be_visible()
    await ask(page, "Short")
    (await puppet.reply(1)).say("Two").end()
    await expect(prompts(page)).to_have_text(["Short"])
    await expect(text(page)).to_have_text("Two")


async def test_regenerate_while_editing_keeps_text(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First", "One")
    await box(page).press("ArrowUp")
    await box(page).fill("My edit")
    await regenerate(page).click()
    (await puppet.reply(1)).say("Two").end()
    await expect(text(page)).to_have_text("Two")
    await expect(box(page)).to_have_value("My edit")
    await expect(page.locator("#editing")).to_be_hidden()


async def test_text_stays_in_box_when_another_client_deletes_conversation(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First", "One")
    await box(page).press("ArrowUp")
    await box(page).fill("My long edit")
    async with client(server) as other:
        await other.send({"type": "delete", "conversation": page.url.partition("#")[2]})
        await other.next("deleted")
    await expect(alert(page)).to_have_text("This conversation was deleted.")
    await expect(page.locator("#editing")).to_be_hidden()
    await expect(box(page)).to_have_value("My long edit")
    await box(page).press("Enter")
    model = await puppet.reply(1)
    assert [m.content for m in model.request.messages] == ["My long edit"]
    model.end()
