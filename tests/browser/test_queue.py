"""Prompts that are sent while a reply runs: they wait, interrupt, or are taken back."""

import re

import pytest
from playwright.async_api import Page, WebSocketRoute, expect

import wsserver
from tests.browser.page import (
    LONGEST_PAUSE,
    ask,
    box,
    button,
    closed,
    cut,
    idle,
    note,
    prompts,
    queue,
    second_tab,
    state,
    stop_clock,
    text,
    visit,
)
from tests.support.puppet import Puppet, Reply
from wsserver import Code, ModelError

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def start(page: Page, puppet: Puppet) -> Reply:
    """Begin a reply, and send a prompt that waits for it."""
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await ask(page, "Next")
    await expect(queue(page)).to_contain_text("Waits for the reply above.")
    return model


def asked(puppet: Puppet) -> list[str]:
    return [model.request.prompt for model in puppet.replies]


async def test_enter_during_reply_sends_after_it(page: Page, puppet: Puppet) -> None:
    model = await start(page, puppet)
    await expect(box(page)).to_have_value("")
    await ask(page, "Last")
    await expect(prompts(page)).to_have_text(["Count", "Next", "Last"])
    await expect(queue(page)).to_have_count(2)
    await expect(page.locator("#keys")).to_contain_text("Enter sends after this reply")
    await expect(button(page)).to_have_accessible_name("Stop")
    assert asked(puppet) == ["Count"]
    model.say("two").end()
    (await puppet.reply(1)).say("Second").end()
    (await puppet.reply(2)).say("Third").end()
    await expect(page.locator(".text")).to_have_text(["one two", "Second", "Third"])
    await idle(page)
    await expect(queue(page)).to_have_count(0)
    said = [message.content for message in puppet.replies[2].request.messages]
    assert said == ["Count", "one two", "Next", "Second", "Last"]


async def test_button_sends_text_during_reply_and_stops_without_text(
    page: Page, puppet: Puppet
) -> None:
    await ask(page, "Count")
    await puppet.reply()
    await box(page).fill("Next")
    await expect(button(page)).to_have_accessible_name("Send after this reply")
    await button(page).click()
    await expect(queue(page)).to_have_count(1)
    await expect(button(page)).to_have_accessible_name("Stop")
    await box(page).fill("A draft")
    await page.get_by_role("button", name="Stop", exact=True).click()
    await closed(puppet.replies[0].closed)
    (await puppet.reply(1)).say("Second").end()
    await expect(text(page)).to_have_text("Second")
    await idle(page)
    await expect(box(page)).to_have_value("A draft")


@pytest.mark.parametrize("key", ["Control+Enter", "Meta+Enter"])
async def test_second_key_interrupts_reply_and_sends(page: Page, puppet: Puppet, key: str) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await box(page).fill("No, this")
    await box(page).press(key)
    await closed(model.closed)
    (await puppet.reply(1)).say("Fine").end()
    await expect(page.locator(".text")).to_have_text(["one ", "Fine"])
    await expect(page.locator(".note").first).to_have_text("Stopped by a later message.")
    await idle(page)


async def test_escape_stops_running_reply_and_next_prompt_follows(
    page: Page, puppet: Puppet
) -> None:
    model = await start(page, puppet)
    await page.keyboard.press("Escape")
    await closed(model.closed)
    (await puppet.reply(1)).say("Second").end()
    await expect(page.locator(".text")).to_have_text(["one ", "Second"])
    await expect(page.locator(".note").first).to_have_text("Stopped.")


async def test_waiting_prompt_can_be_removed_and_edited(page: Page, puppet: Puppet) -> None:
    model = await start(page, puppet)
    tab = await second_tab(page)
    await expect(queue(tab)).to_have_count(1)
    await queue(page).get_by_role("button", name="Remove").click()
    for each in (page, tab):
        await expect(prompts(each)).to_have_text(["Count"])
    await ask(page, "Other")
    await expect(queue(tab)).to_have_count(1)
    await queue(page).get_by_role("button", name="Edit").click()
    await expect(box(page)).to_have_value("Other")
    await expect(box(page)).to_be_focused()
    for each in (page, tab):
        await expect(prompts(each)).to_have_text(["Count"])
    model.say("two").end()
    await idle(page)
    assert asked(puppet) == ["Count"]
    await page.reload()
    await expect(prompts(page)).to_have_text(["Count"])
    await expect(box(page)).to_have_value("Other")


async def test_prompt_removed_after_its_reply_began_stays(
    blank: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    held: list[str | bytes] | None = None  # frames of the server

    def route(client: WebSocketRoute) -> None:
        upstream = client.connect_to_server()

        def on_message(message: str | bytes) -> None:
            if held is None:
                client.send(message)
            else:
                held.append(message)

        upstream.on_message(on_message)
        routes.append(client)

    routes: list[WebSocketRoute] = []
    await blank.route_web_socket(re.compile("/ws$"), route)
    await visit(blank, server)
    model = await start(blank, puppet)
    held = []
    model.end()
    second = await puppet.reply(1)
    await queue(blank).get_by_role("button", name="Remove").click()
    await closed(second.closed)
    await expect(prompts(blank)).to_have_text(["Count"])
    frames, held = held, None
    for frame in frames:
        routes[-1].send(frame)
    await expect(prompts(blank)).to_have_text(["Count", "Next"])
    await expect(note(blank)).to_have_text("Stopped.")
    await idle(blank)


async def test_waiting_prompt_survives_reload(page: Page, puppet: Puppet) -> None:
    model = await start(page, puppet)
    await page.reload()
    await expect(prompts(page)).to_have_text(["Count", "Next"])
    await expect(queue(page)).to_have_count(1)
    await expect(box(page)).to_have_value("")
    model.say("two").end()
    (await puppet.reply(1)).say("Second").end()
    await expect(page.locator(".text")).to_have_text(["one two", "Second"])
    assert asked(puppet) == ["Count", "Next"]


async def test_prompt_without_connection_waits_and_is_sent_once(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    model = await start(timed, puppet)
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await expect(queue(timed)).to_contain_text("Waits for the connection.")
    await ask(timed, "Last")
    await expect(queue(timed)).to_have_count(2)
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(state(timed)).to_have_text("Connected")
    model.end()
    (await puppet.reply(1)).say("Second").end()
    (await puppet.reply(2)).say("Third").end()
    await expect(timed.locator(".text")).to_have_text(["one ", "Second", "Third"])
    assert asked(puppet) == ["Count", "Next", "Last"]


async def test_waiting_prompt_is_kept_after_long_loss_of_connection(
    blank: Page, puppet: Puppet
) -> None:
    await blank.clock.install()
    async with wsserver.serve(puppet, port=0, drain_timeout=0, grace=0) as server:
        await visit(blank, server)
        model = await start(blank, puppet)
        await stop_clock(blank)
        cut(server)
        await closed(model.closed)
        await expect(state(blank)).to_have_text("Not connected, trying again…")
        await blank.clock.fast_forward(LONGEST_PAUSE)
        await blank.clock.resume()
        await expect(queue(blank)).to_contain_text("connection was lost for too long")
        await blank.reload()
        await expect(prompts(blank)).to_have_text(["Count"])
        await expect(box(blank)).to_have_value("Next")


async def test_interrupted_queue_is_kept(page: Page, puppet: Puppet) -> None:
    await start(page, puppet)
    await box(page).fill("This first")
    await box(page).press("Control+Enter")
    (await puppet.reply(1)).say("Fine").end()
    await expect(text(page)).to_have_text("Fine")
    await expect(queue(page)).to_contain_text("a later message interrupted")
    await queue(page).get_by_role("button", name="Edit").click()
    await expect(box(page)).to_have_value("Next")
    await expect(queue(page)).to_have_count(0)
    assert asked(puppet) == ["Count", "This first"]


async def test_failed_reply_with_prompt_after_it_has_no_retry(page: Page, puppet: Puppet) -> None:
    model = await start(page, puppet)
    model.fail(ModelError(Code.OVERLOADED))
    (await puppet.reply(1)).say("Second").end()
    await expect(text(page)).to_have_text("Second")
    await idle(page)
    await expect(page.locator(".note").first).to_have_text(Code.OVERLOADED.meaning)
    await expect(page.get_by_role("button", name="Retry")).to_have_count(0)


async def test_prompt_over_limit_of_queue_can_be_repeated(blank: Page, puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0, generations_per_socket=2) as server:
        await visit(blank, server)
        model = await start(blank, puppet)
        await ask(blank, "Too many")
        again = blank.get_by_role("button", name="Retry")
        await expect(blank.locator(".note").last).to_contain_text("Wait for the end of one.")
        model.end()
        second = await puppet.reply(1)
        await again.click()
        await expect(queue(blank)).to_have_count(1)
        second.end()
        (await puppet.reply(2)).say("Third").end()
        await expect(text(blank)).to_have_text("Third")
        assert asked(puppet) == ["Count", "Next", "Too many"]


async def test_prompts_of_two_tabs_wait_for_each_other(page: Page, puppet: Puppet) -> None:
    model = await start(page, puppet)
    tab = await second_tab(page)
    await ask(tab, "From the other tab")
    for each in (page, tab):
        await expect(prompts(each)).to_have_text(["Count", "Next", "From the other tab"])
        await expect(queue(each)).to_have_count(2)
    model.end()
    for number, said in ((1, "Second"), (2, "Third")):
        (await puppet.reply(number)).say(said).end()
    for each in (page, tab):
        await expect(each.locator(".text")).to_have_text(["one ", "Second", "Third"])
