"""The time of messages, and how long the model thought, on the page."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from playwright.async_api import Locator, Page, WebSocketRoute, expect

import wsserver
from tests.browser.page import ask, converse, idle, reply, second_tab, state, text, visit
from tests.support.puppet import Puppet, Thinking

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]
SERVERS = r"^Thought for (less than a second|\d+ s)$"  # less than what the page saw
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def summary(page: Page) -> Locator:
    return reply(page).locator("summary")


def sent(page: Page) -> Locator:
    return page.locator(".sent time").last


def ended(page: Page) -> Locator:
    return page.locator(".ended time").last


async def set_clocks(page: Page, passed: float, *, date: datetime) -> None:
    """Stop the clock that measures durations, in seconds, and the clock of the user."""
    await page.clock.set_fixed_time(date)
    await page.evaluate("now => { performance.now = () => now }", 10_000 + passed * 1000)


async def change_frames(page: Page, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the frames of the server on their way."""

    def connected(route: WebSocketRoute) -> None:
        def forward(message: str | bytes) -> None:
            frame = json.loads(message)
            change(frame)
            route.send(json.dumps(frame))

        route.connect_to_server().on_message(forward)

    await page.route_web_socket("**/ws", connected)


async def test_summary_counts_seconds_of_thinking_whatever_the_date(
    page: Page, puppet: Puppet
) -> None:
    await set_clocks(page, 0, date=NOON)
    await page.evaluate("""() => {
        globalThis.said = []
        for (const region of document.querySelectorAll('[role=status], [role=alert]')) {
            new MutationObserver(() => said.push(region.textContent))
                .observe(region, { childList: true, characterData: true, subtree: true })
        }
    }""")
    await ask(page, "Think")
    model = (await puppet.reply()).say(Thinking("Hm. "))
    await expect(summary(page)).to_be_visible()
    await expect(summary(page)).to_have_text("Thinking…")
    await set_clocks(page, 5, date=NOON + timedelta(hours=1))
    await expect(summary(page)).to_have_text("Thinking… 5 s")
    await expect(summary(page).locator("[aria-hidden=true]")).to_have_text(" 5 s")
    model.say("Text. ")
    await expect(summary(page)).to_have_text("Thought for 5 s")
    model.say(Thinking("And hm."))
    await expect(summary(page)).to_have_text("Thinking… 5 s")
    await set_clocks(page, 65, date=NOON - timedelta(hours=1))
    await expect(summary(page)).to_have_text("Thinking… 1 min 5 s")
    assert [words for words in await page.evaluate("said") if words] == ["Sent."]
    model.end()
    for _ in range(2):
        await expect(summary(page)).to_have_text(re.compile(SERVERS))
        await page.reload()


async def test_duration_of_thinking_is_the_servers(
    blank: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    def change(frame: dict[str, Any]) -> None:
        for each in (frame, *frame.get("messages", ())):
            if "thought" in each:
                each["thought"] = 72.4

    await change_frames(blank, change)
    await visit(blank, server)
    await ask(blank, "Think")
    (await puppet.reply()).say(Thinking("Hm."), "Text.").end()
    for _ in range(2):
        await expect(summary(blank)).to_have_text("Thought for 1 min 12 s")
        await blank.reload()


async def test_saved_thinking_without_duration_has_none(
    blank: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    def change(frame: dict[str, Any]) -> None:
        for each in (frame, *frame.get("messages", ())):
            each.pop("thought", None)

    await change_frames(blank, change)
    await visit(blank, server)
    await ask(blank, "Think")
    (await puppet.reply()).say(Thinking("Hm."), "Text.").end()
    await idle(blank)
    await blank.reload()
    await expect(summary(blank)).to_have_text("Thought")


async def test_messages_have_times(page: Page, puppet: Puppet) -> None:
    full = "new Intl.DateTimeFormat([], { dateStyle: 'full', timeStyle: 'medium' }).format()"
    await converse(page, puppet, "First", "One")
    tab = await second_tab(page)
    await page.clock.set_fixed_time(NOON)
    await ask(page, "Second")
    model = (await puppet.reply(1)).say("Two")
    await expect(text(page)).to_have_text("Two")
    await expect(sent(page)).to_have_attribute("datetime", "2026-01-02T12:00:00.000Z")
    await expect(ended(page)).to_be_hidden()
    await page.clock.set_fixed_time(NOON + timedelta(hours=1))
    model.end()
    await expect(ended(page)).to_have_attribute("datetime", "2026-01-02T13:00:00.000Z")
    await expect(ended(page)).to_have_attribute("title", await page.evaluate(full))
    for each in (page, tab):
        await each.reload()
        history = await each.evaluate("""async () => {
            const { connect } = await import('/client.js')
            const chat = connect()
            const { messages } = await chat.open(location.hash.slice(1))
            chat.close()
            const times = messages.map(({ began, ended }) => ended ?? began)
            return times.map((seconds) => new Date(seconds * 1000).toISOString())
        }""")
        await expect(each.locator(".turn time")).to_have_count(4)
        times = each.locator(".turn time")
        shown = await times.evaluate_all("all => all.map(({ dateTime }) => dateTime)")
        assert shown == history


async def test_prompt_of_another_tab_has_time(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await ask(page, "Second")
    (await puppet.reply(1)).say("Two").end()
    await expect(text(tab)).to_have_text("Two")
    await expect(tab.locator(".turn time")).to_have_count(4)


async def test_times_are_shown_while_turn_has_pointer_or_focus(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First", "One")
    await page.mouse.move(0, 0)
    for shown in (page.locator(".sent"), page.locator(".ended")):
        await expect(shown).to_have_css("opacity", "0")
        await text(page).hover()
        await expect(shown).to_have_css("opacity", "1")
        await page.mouse.move(0, 0)
        await expect(shown).to_have_css("opacity", "0")
        await page.get_by_role("button", name="Copy the reply").focus()
        await expect(shown).to_have_css("opacity", "1")
        await page.locator("#prompt").focus()


async def test_time_of_another_day_has_date(
    blank: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    def change(frame: dict[str, Any]) -> None:
        for message in frame.get("messages", ()):
            message["began"] = 1_500_000_000.0

    await change_frames(blank, change)
    await visit(blank, server)
    await converse(blank, puppet, "First")
    await blank.reload()
    await expect(state(blank)).to_have_text("Connected")
    await expect(sent(blank)).to_contain_text("2017")
