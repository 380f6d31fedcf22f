"""Drafts on the page: one for each conversation, over reloads, crashes and deletes."""

import asyncio

import pytest
from playwright.async_api import Browser, Page, expect

import wsserver
from tests.browser.page import (
    alert,
    ask,
    box,
    converse,
    idle,
    prompts,
    rows,
    second_tab,
    state,
    text,
    visit,
)
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]
STORED = "Object.keys(localStorage).filter((key) => key.startsWith('draft '))"


async def test_each_conversation_has_its_own_draft(page: Page, puppet: Puppet) -> None:
    new = page.get_by_role("link", name="New conversation")
    await converse(page, puppet, "First one")
    await box(page).fill("For the first")
    await new.click()
    await expect(box(page)).to_have_value("")
    await box(page).fill("For a new one")
    await page.get_by_role("link", name="First one").click()
    await expect(box(page)).to_have_value("For the first")
    await new.click()
    await expect(box(page)).to_have_value("For a new one")
    await box(page).press("Enter")
    (await puppet.reply(1)).say("Yes").end()
    await idle(page)
    await box(page).fill("For the second")
    await new.click()
    await expect(box(page)).to_have_value("")
    await page.go_back()
    await expect(box(page)).to_have_value("For the second")


async def test_drafts_are_kept_while_the_storage_is_full(page: Page, puppet: Puppet) -> None:
    new = page.get_by_role("link", name="New conversation")
    await converse(page, puppet, "First one")
    await box(page).fill("An older draft")
    await page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full') } }"
    )
    await box(page).fill("For the first")
    await new.click()
    await box(page).fill("For a new one")
    await page.get_by_role("link", name="First one").click()
    await expect(box(page)).to_have_value("For the first")
    await box(page).fill("")
    await new.click()
    await expect(box(page)).to_have_value("For a new one")
    await page.get_by_role("link", name="First one").click()
    await expect(box(page)).to_have_value("")


@pytest.mark.parametrize("conversation", ["new", "known"])
async def test_draft_survives_reload(page: Page, puppet: Puppet, conversation: str) -> None:
    if conversation == "known":
        await converse(page, puppet, "First")
    await box(page).fill("Half a\nthought")
    await page.reload()
    await expect(box(page)).to_have_value("Half a\nthought")
    number = len(puppet.replies)
    await box(page).press("Enter")
    (await puppet.reply(number)).say("Whole").end()
    await expect(text(page)).to_have_text("Whole")
    await page.reload()
    await expect(text(page)).to_have_text("Whole")
    await expect(box(page)).to_have_value("")


async def test_draft_survives_crash_of_tab(
    browser: Browser, server: wsserver.Server, puppet: Puppet
) -> None:
    context = await browser.new_context()
    context.set_default_timeout(BOUND * 1000)
    page = await context.new_page()
    await visit(page, server)
    await converse(page, puppet, "First")
    address = page.url
    await box(page).fill("Half a thought")
    crashed = asyncio.Event()
    page.on("crash", lambda _: crashed.set())
    devtools = await context.new_cdp_session(page)
    crash = asyncio.ensure_future(devtools.send("Page.crash"))
    async with asyncio.timeout(BOUND):
        await crashed.wait()
    crash.cancel()
    await page.close()
    page = await context.new_page()
    await page.goto(address)
    await expect(text(page)).to_have_text("Reply")
    await expect(box(page)).to_have_value("Half a thought")
    await context.close()


async def test_draft_of_new_conversation_belongs_to_its_tab(page: Page) -> None:
    await box(page).fill("Mine")
    tab = await second_tab(page)
    await expect(box(tab)).to_have_value("")


async def test_deleted_conversation_leaves_no_draft(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    await box(page).fill("Secret")
    assert len(await page.evaluate(STORED)) == 1
    await page.get_by_role("button", name="Delete “First”").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(rows(page)).to_have_count(0)
    await expect(box(page)).to_have_value("")
    assert await page.evaluate(STORED) == []


async def test_conversation_deleted_elsewhere_leaves_no_draft(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    await box(page).fill("Secret")
    conversation = page.url.partition("#")[2]
    await page.get_by_role("link", name="New conversation").click()
    async with client(server) as other:
        await other.send({"type": "delete", "conversation": conversation})
        await other.next("deleted")
    await page.go_back()
    await expect(alert(page)).to_have_text("There is no such conversation.")
    await expect(box(page)).to_have_value("")
    assert await page.evaluate(STORED) == []


async def test_oldest_drafts_are_dropped(page: Page, puppet: Puppet) -> None:
    await page.evaluate("""() => {
        for (let number = 0; number < 60; number++) {
            localStorage.setItem(`draft ${number}`, JSON.stringify({ text: 'x', at: number }))
        }
    }""")
    await converse(page, puppet, "First")
    await box(page).fill("Newest")
    stored = await page.evaluate(STORED)
    assert len(stored) == 50
    assert "draft 59" in stored
    assert "draft 10" not in stored
    await page.reload()
    await expect(box(page)).to_have_value("Newest")


async def test_prompt_that_never_arrived_is_a_draft_after_reload(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await page.evaluate("""() => {
        const { send } = WebSocket.prototype
        WebSocket.prototype.send = function (data) {
            if (JSON.parse(data).type !== 'prompt') send.call(this, data)
        }
    }""")
    await ask(page, "Lost")
    await expect(prompts(page)).to_have_text(["Lost"])
    await box(page).fill("And more")
    await page.reload()
    await expect(alert(page)).to_have_text("Your message did not reach the server. Send it again.")
    await expect(box(page)).to_have_value("Lost\n\nAnd more")
    assert await page.evaluate(STORED) == []
    await expect(state(page)).to_have_text("Connected")
    await box(page).press("Enter")
    (await puppet.reply()).say("Found").end()
    await expect(text(page)).to_have_text("Found")
    await page.reload()
    await expect(text(page)).to_have_text("Found")
    await expect(box(page)).to_have_value("")


async def test_long_draft_survives_reload(page: Page) -> None:
    await box(page).fill("word " * 30_000)
    await page.reload()
    await expect(box(page)).to_have_value("word " * 30_000)
