"""Conversations on the page: history, list, rename, delete, tabs."""

import re

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import (
    LONGEST_PAUSE,
    alert,
    ask,
    box,
    button,
    closed,
    converse,
    cut,
    dismiss,
    idle,
    note,
    queue,
    rename,
    reply,
    rows,
    second_tab,
    state,
    stop_clock,
    text,
    title,
    visit,
)
from tests.support.client import client
from tests.support.puppet import Puppet
from wsserver import Code, ModelError, Thinking, Usage
from wsserver.errors import StoreError
from wsserver.stores import MemoryStore

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_page_reload_continues_running_reply(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    await ask(page, "Count")
    model = (await puppet.reply(1)).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await page.reload()
    await expect(text(page)).to_have_text("one two")
    await expect(page.locator(".you p")).to_have_text(["First", "Count"])
    await expect(button(page)).to_have_accessible_name("Stop")
    model.say("three").end()
    await expect(text(page)).to_have_text("one two three")
    await idle(page)
    await converse(page, puppet, "Third", "Done")
    said = [message.content for message in puppet.replies[2].request.messages]
    assert said == ["First", "Reply", "Count", "one two three", "Third"]


async def test_page_reload_keeps_thinking_model_and_usage(page: Page, puppet: Puppet) -> None:
    await ask(page, "Hello")
    model = await puppet.reply()
    model.say(Thinking("A greeting. "), Thinking("I greet back."), "Hi!", Usage(1234, 56)).end()
    await expect(text(page)).to_have_text("Hi!")
    for _ in range(2):
        thinking = reply(page).locator("details")
        await expect(thinking.locator("summary")).to_have_text("Thought for less than a second")
        await thinking.locator("summary").click()
        await expect(thinking.locator("p")).to_have_text("A greeting. I greet back.")
        await expect(reply(page).locator(".usage")).to_have_text("puppet · 1,234 tokens in, 56 out")
        await page.reload()
        await expect(text(page)).to_have_text("Hi!")


async def test_page_reload_keeps_thinking_of_stopped_reply(page: Page, puppet: Puppet) -> None:
    await ask(page, "Hello")
    (await puppet.reply()).say(Thinking("A greeting."), "Hi", Usage(1234, 56))
    await expect(text(page)).to_have_text("Hi")
    await page.keyboard.press("Escape")
    for _ in range(2):
        await expect(note(page)).to_have_text("Stopped.")
        await expect(text(page)).to_have_text("Hi")
        await reply(page).locator("summary").click()
        await expect(reply(page).locator("details p")).to_have_text("A greeting.")
        await expect(reply(page).locator(".usage")).to_have_text("puppet · 1,234 tokens in, 56 out")
        await page.reload()


async def test_two_tabs_show_same_reply_and_each_can_stop_it(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    tab = await second_tab(page)
    await expect(text(tab)).to_have_text("one")
    model.say("two ")
    for each in (page, tab):
        await expect(text(each)).to_have_text("one two")
    await tab.keyboard.press("Escape")
    await closed(model.closed)
    for each in (page, tab):
        await expect(note(each)).to_have_text("Stopped.")
        await idle(each)
    await ask(tab, "Again")  # the first tab shows this too
    (await puppet.reply(1)).say("whole").end()
    for each in (page, tab):
        await expect(each.locator(".you p")).to_have_text(["Count", "Again"])
        await expect(text(each)).to_have_text("whole")
        await idle(each)


async def test_address_contains_conversation_id(page: Page, puppet: Puppet) -> None:
    assert "#" not in page.url
    await expect(title(page)).to_have_text("New conversation")
    await converse(page, puppet, "First one", "Reply to the first")
    first = page.url
    await expect(page).to_have_title("First one · wsserver")
    await page.get_by_role("link", name="New conversation").click()
    await expect(page.locator("article")).to_have_count(0)
    await expect(page).to_have_title("wsserver")
    await expect(box(page)).to_be_focused()
    await converse(page, puppet, "Second one", "Reply to the second")
    assert page.url != first
    await page.go_back()
    await expect(text(page)).to_have_text("Reply to the first")
    await page.go_forward()
    await expect(text(page)).to_have_text("Reply to the second")
    await expect(page.get_by_role("link", name="Second one")).to_have_attribute(
        "aria-current", "page"
    )
    await page.get_by_role("link", name="First one").click()
    await expect(title(page)).to_have_text("First one")
    await expect(page.locator(".text")).to_have_text(["Reply to the first"])


async def test_reply_continues_while_another_conversation_is_open(
    page: Page, puppet: Puppet
) -> None:
    await ask(page, "First one")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await page.get_by_role("link", name="New conversation").click()
    await idle(page)
    await converse(page, puppet, "Second one", "Reply to the second")
    model.say("two ")
    await expect(page.locator(".text")).to_have_text(["Reply to the second"])
    await page.get_by_role("link", name="First one").click()
    await expect(page.locator(".text")).to_have_text(["one two"])
    model.say("three").end()
    await expect(text(page)).to_have_text("one two three")


async def test_unsent_prompt_is_kept_in_its_conversation(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First one")
    await timed.get_by_role("link", name="New conversation").click()
    await converse(timed, puppet, "Second one")
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await ask(timed, "Unsent")
    await timed.get_by_role("link", name="First one").click()
    await expect(timed.locator("article")).to_have_count(0)  # the server cannot load it now
    await timed.get_by_role("link", name="Second one").click()
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    (await puppet.reply(2)).say("Sent").end()
    await expect(timed.locator(".you p")).to_have_text(["Second one", "Unsent"])
    await expect(text(timed)).to_have_text("Sent")
    said = [message.content for message in puppet.replies[2].request.messages]
    assert said == ["Second one", "Reply", "Unsent"]


async def test_edited_title_survives_list_refresh(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First one")
    tab = await second_tab(page, page.url.partition("#")[0])
    await page.bring_to_front()
    await page.get_by_role("button", name="Rename “First one”").click()
    field = page.get_by_role("textbox", name="Title")
    await field.fill("Half")
    await converse(tab, puppet, "Second one")  # it is then the first of the list
    await expect(rows(tab)).to_have_count(2)
    await expect(field).to_have_value("Half")
    await field.press("End")
    await field.press_sequentially(" a title")
    await field.press("Enter")
    for each in (page, tab):
        await expect(rows(each).get_by_role("link")).to_have_text(["Second one", "Half a title"])


async def test_address_of_unknown_conversation_shows_message(
    page: Page, server: wsserver.Server
) -> None:
    await page.goto(f"{server.page}#{'x' * 32}")
    await expect(alert(page)).to_have_text("There is no such conversation.")
    await expect(page.get_by_role("list", name="Things to try")).to_be_visible()
    await expect(page.locator("[aria-busy=true]")).to_have_count(0)
    await expect(title(page)).to_have_text("New conversation")
    assert "#" not in page.url


async def test_history_notes_missing_and_shortened_replies(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "Silence", "")
    await ask(page, "Much")
    (await puppet.reply(1)).say(*["word " * 1000] * 80).end()
    await idle(page)
    await converse(page, puppet, "Little")
    await page.reload()
    shown = ["Silence", "Much", "Little"]
    for number in (2, 1):  # each frame has one of these
        await expect(page.locator(".you p")).to_have_text(shown[number:])
        await page.get_by_role("button", name="Show earlier messages").click()
    await expect(page.locator(".you p")).to_have_text(shown)
    await expect(page.locator(".note").first).to_have_text("There is no reply.")
    await expect(page.locator(".note").nth(1)).to_contain_text("Shortened")
    await expect(page.locator("[aria-busy=true]")).to_have_count(0)


async def test_rename_edits_title_in_list(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await rename(page, "  A title of mine ")
    for each in (page, tab):
        await expect(rows(each).get_by_role("link")).to_have_text("A title of mine")
        await expect(title(each)).to_have_text("A title of mine")
        await expect(each).to_have_title("A title of mine · wsserver")
    await page.get_by_role("button", name=re.compile("^Rename")).click()
    field = page.get_by_role("textbox", name="Title")
    await field.fill("Not this")
    await field.press("Escape")
    await expect(rows(page).get_by_role("link")).to_be_focused()
    await page.reload()
    await expect(title(page)).to_have_text("A title of mine")


async def test_title_of_model_appears_in_list_and_heading(blank: Page, puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0, titles="on") as server:
        await visit(blank, server)
        await ask(blank, "How do I bake a sourdough bread?")
        (await puppet.reply()).say("With flour.").end()
        await expect(rows(blank)).to_have_text(["How do I bake a sourdough bread?"])
        tab = await second_tab(blank)
        elsewhere = await second_tab(blank, server.page)
        (await puppet.reply(1)).say("Sourdough at home").end()
        for each in (blank, tab, elsewhere):
            await expect(rows(each)).to_have_text(["Sourdough at home"])
        for each in (blank, tab):
            await expect(title(each)).to_have_text("Sourdough at home")


async def test_right_to_left_text_has_its_direction_everywhere(page: Page, puppet: Puppet) -> None:
    arabic = "خبز العجين المخمر"

    async def directions(*selectors: str) -> set[str]:
        return {
            await page.locator(selector).first.evaluate("it => getComputedStyle(it).direction")
            for selector in selectors
        }

    await ask(page, arabic)
    (await puppet.reply()).say(Thinking(arabic), f"{arabic} `code`\n\n```\ncode\n```\n").fail(
        ModelError(Code.OVERLOADED, arabic)
    )
    await expect(rows(page)).to_have_text([arabic])
    await box(page).fill(arabic)
    written = "#title", "#list a", ".you p", ".thinking p", ".text > p", ".note", "#prompt"
    assert await directions(*written) == {"rtl"}
    assert await directions(".text code", ".text pre") == {"ltr"}
    await page.get_by_role("button", name=re.compile("^Rename")).click()
    assert await directions("#list input") == {"rtl"}
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name=re.compile("^Delete")).click()
    await page.keyboard.press("Escape")
    await page.reload()
    await expect(rows(page)).to_have_text([arabic])
    await expect(box(page)).to_have_value(arabic)
    assert await directions("#title", "#list a", ".you p", ".text > p", "#prompt") == {"rtl"}
    await box(page).press("Enter")
    await puppet.reply(1)
    await ask(page, f"{arabic}\nEnglish")
    await expect(queue(page)).to_have_count(1)
    assert await page.locator(".you p").last.evaluate("it => getComputedStyle(it).direction") == (
        "rtl"
    )


async def test_hidden_idle_page_does_not_reconnect_for_other_tabs(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await expect(rows(tab)).to_have_count(1)
    dismiss(server, 1000, "idle")
    for each in (page, tab):
        await expect(state(each)).to_have_text("Idle; the next message connects")
    await tab.evaluate("""() => {
        Object.defineProperty(document, 'visibilityState', { value: 'hidden' });
        const others = new BroadcastChannel('wsserver');
        window.heard = new Promise((resolve) => { others.onmessage = () => resolve(true); });
    }""")
    await rename(page, "Second")
    await tab.evaluate("heard")
    await expect(state(page)).to_have_text("Connected")
    assert await state(tab).text_content() == "Idle; the next message connects"


async def test_conversation_deleted_in_other_browser_disappears(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    await expect(rows(page)).to_have_count(1)
    async with client(server) as other:
        await other.send({"type": "delete", "conversation": page.url.partition("#")[2]})
        await other.next("deleted")
    await expect(rows(page)).to_have_count(0)
    await expect(page.get_by_text("This conversation was deleted.")).to_be_visible()


async def test_failed_rename_shows_message(
    page: Page, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> bool:
        raise StoreError("disk")

    await converse(page, puppet, "First")
    await expect(rows(page)).to_have_count(1)
    monkeypatch.setattr(MemoryStore, "rename", broken)
    await page.get_by_role("button", name=re.compile("^Rename")).click()
    await page.get_by_role("textbox", name="Title").fill("Second")
    await page.keyboard.press("Enter")
    complaint = page.get_by_role("navigation", name="Conversations").get_by_role("alert")
    await expect(complaint).to_contain_text("cannot read or save")
    await expect(rows(page)).to_have_text(["First"])


async def test_delete_asks_for_confirmation(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await expect(text(tab)).to_have_text("Reply")
    delete = page.get_by_role("button", name="Delete “First”")
    for how in ("Keep it", ""):
        await delete.click()
        if how:
            await page.get_by_role("button", name=how).click()
        else:
            await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog")).to_be_hidden()
        await expect(delete).to_be_focused()
    await expect(rows(page)).to_have_count(1)
    await delete.click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    for each in (page, tab):
        await expect(rows(each)).to_have_count(0)
        await expect(each.locator("article")).to_have_count(0)
        await expect(alert(each)).to_have_text("This conversation was deleted.")
    await converse(page, puppet, "Afresh")
    assert [message.content for message in puppet.replies[1].request.messages] == ["Afresh"]


@pytest.mark.parametrize("by", ["keyboard", "scrolling"])
async def test_list_loads_more_conversations(
    page: Page, server: wsserver.Server, puppet: Puppet, by: str
) -> None:
    async with client(server) as other:
        for number in range(32):
            start = await other.prompt(f"Number {number}", conversation=f"{number:032}")
            (await puppet.reply(number)).end()
            await other.text(start["id"])
    await page.reload()
    await expect(rows(page)).to_have_count(30)
    more = page.get_by_role("button", name="Show older conversations")
    if by == "keyboard":
        await more.focus()
        await expect(page.get_by_role("link", name="Number 1", exact=True)).to_be_focused()
    else:
        await rows(page).last.scroll_into_view_if_needed()
    await expect(rows(page)).to_have_count(32)
    await expect(more).to_be_hidden()
    await converse(page, puppet, "One more")
    await expect(rows(page)).to_have_count(33)
    await expect(rows(page).first).to_have_text("One more")


async def test_history_loads_earlier_messages(blank: Page, puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0, history_messages=4) as server:
        await visit(blank, server)
        for number in range(5):
            await converse(blank, puppet, f"Question {number}", f"Answer {number}\n" * 30)
        await blank.reload()
        earlier = blank.get_by_role("button", name="Show earlier messages")
        await expect(earlier).to_be_visible()
        shown = await blank.locator("article").count()
        # Until the page notices, it follows the newest message: also when Markdown changes a size.
        await blank.evaluate(
            "new Promise((resolve) => { const scroll = () => { "
            "if (!document.querySelector('#jump').hidden) return resolve(); "
            "scrollTo(0, 0); requestAnimationFrame(scroll) }; scroll() })"
        )
        top = "document.querySelector('article:last-of-type').getBoundingClientRect().top"
        before = await blank.evaluate(top)
        await earlier.click()
        await expect(blank.locator("article")).not_to_have_count(shown)
        assert abs(await blank.evaluate(top) - before) < 2
        while await earlier.is_visible():
            shown = await blank.locator("article").count()
            await earlier.click()
            await expect(blank.locator("article")).not_to_have_count(shown)
        await expect(blank.locator(".you p")).to_have_text([f"Question {n}" for n in range(5)])
