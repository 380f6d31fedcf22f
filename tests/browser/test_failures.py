"""Failed replies on the page: messages, and retries."""

import re

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import ask, box, converse, idle, note, reply, second_tab, text, visit
from tests.support.client import client
from tests.support.puppet import Puppet
from wsserver import Code, End, ModelError, Usage

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_failed_reply_shows_text_reason_and_retry(timed: Page, puppet: Puppet) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = (await puppet.reply()).say("Half an")
    model.fail(ModelError(Code.OVERLOADED, "It is busy.", retry_after=60))
    await expect(note(timed)).to_have_text("It is busy.")
    await expect(text(timed)).to_have_text("Half an")
    await idle(timed)
    again = timed.get_by_role("button", name=re.compile("^Retry"))
    await expect(again).to_have_text(re.compile(r"Retry in \d\d s"))
    await again.dispatch_event("click")
    await expect(timed.locator("article")).to_have_count(1)
    await timed.clock.fast_forward(61_000)
    await expect(again).to_have_text("Retry")
    await again.click()
    (await puppet.reply(1)).say("Whole").end()
    await expect(text(timed)).to_have_text("Whole")
    said = [[m.content for m in model.request.messages] for model in puppet.replies]
    assert said == [["Count"], ["Count"]]
    for _ in range(2):  # also in the history
        await expect(timed.locator("article")).to_have_count(1)
        await expect(again).to_have_count(0)
        await timed.reload()
        await expect(text(timed)).to_have_text("Whole")


async def test_page_has_message_of_each_code(page: Page) -> None:
    shown = await page.evaluate("import('./errors.js').then(({ MEANINGS }) => MEANINGS)")
    assert shown == {code.value: code.meaning for code in Code}


@pytest.mark.parametrize("code", [Code.RATE_LIMITED, Code.CREDENTIALS, Code.INTERNAL])
async def test_failed_reply_says_what_to_do_and_has_reference(
    page: Page, server: wsserver.Server, puppet: Puppet, code: Code
) -> None:
    await ask(page, "Count")
    error = RuntimeError("secret") if code is Code.INTERNAL else ModelError(code)
    (await puppet.reply()).say("Half", Usage(12, 3)).fail(error)
    await expect(note(page)).to_have_text(code.meaning)
    reference = reply(page).get_by_role("button", name="Reference")
    await expect(reference).to_have_text(re.compile(r"^Reference [0-9a-f]{8}$"))
    label = str(await reference.text_content())
    await reference.click()
    await expect(reference).to_have_text("Reference copied")
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert f"Reference {copied}" == label
    await page.reload()
    await expect(text(page)).to_have_text("Half")
    await expect(note(page)).to_have_text(code.meaning)
    await expect(reply(page).locator(".usage")).to_have_text("puppet · 12 tokens in, 3 out")
    await reference.click()
    await expect(reference).to_have_text("Reference copied")
    copied = await page.evaluate("navigator.clipboard.readText()")
    async with client(server) as other:
        await other.send({"type": "resume", "id": copied})
        assert (await other.next("error"))["code"] == code


async def test_retry_replaces_failed_turn_in_every_tab(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    await ask(page, "Second")
    (await puppet.reply(1)).say("Half").fail(ModelError(Code.OVERLOADED))
    again = page.get_by_role("button", name="Retry")
    await expect(again).to_be_visible()
    tab = await second_tab(page)
    await expect(text(tab)).to_have_text("Half")
    await page.reload()
    await again.click()
    model = (await puppet.reply(2)).say("More")
    for shown in (page, tab):
        await expect(shown.locator(".text")).to_have_text(["Reply", "More"])
    await tab.reload()  # while the retry runs
    await expect(tab.locator(".text")).to_have_text(["Reply", "More"])
    model.say(" and all").end()
    for shown in (page, tab):
        await expect(shown.locator(".text")).to_have_text(["Reply", "More and all"])
        await expect(shown.locator(".you p")).to_have_text(["First", "Second"])
    await page.reload()
    await expect(page.locator(".text")).to_have_text(["Reply", "More and all"])
    async with client(server) as other:
        await other.send({"type": "open", "conversation": page.url.partition("#")[2]})
        history = await other.next("history")
    said = [message["content"] for message in history["messages"]]
    assert said == ["First", "Reply", "Second", "More and all"]
    assert [m.content for m in model.request.messages] == ["First", "Reply", "Second"]


async def test_refused_retry_can_be_repeated(blank: Page, puppet: Puppet) -> None:
    await blank.clock.install()
    async with wsserver.serve(puppet, port=0, drain_timeout=0, generations=1) as server:
        await visit(blank, server)
        await ask(blank, "Count")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        again = blank.get_by_role("button", name="Retry")
        await expect(again).to_be_visible()
        async with client(server) as other:
            await other.prompt("Something else")
            await again.click()
            await expect(blank.locator(".text")).to_have_text(["Half", ""])
            await expect(note(blank)).to_contain_text("maximum number of replies")
            await other.send({"type": "stop"})
            await other.next("done")
        await again.click()
        (await puppet.reply(2)).say("Whole").end()
        await expect(blank.locator(".text")).to_have_text(["Whole"])
        assert [m.content for m in puppet.replies[2].request.messages] == ["Count"]


async def test_refused_prompt_can_be_repeated(blank: Page, puppet: Puppet) -> None:
    await blank.clock.install()
    async with wsserver.serve(puppet, port=0, drain_timeout=0, prompts_per_minute=1) as server:
        await visit(blank, server)
        await converse(blank, puppet, "First")
        await ask(blank, "Second")
        again = blank.get_by_role("button", name=re.compile("^Retry in"))
        await expect(again).to_be_visible()
        await expect(note(blank)).not_to_be_empty()
        assert len(puppet.replies) == 1
        await blank.clock.fast_forward(61_000)
        await blank.get_by_role("button", name="Retry", exact=True).click()
        await expect(note(blank)).not_to_be_empty()  # the clock of the server does not stop
        await expect(blank.locator("article")).to_have_count(2)


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("end_turn", ""),
        ("max_tokens", "Ended at the maximum length."),
        ("pause_turn", "Ended early: pause turn."),
    ],
)
async def test_early_stop_reason_is_shown(
    page: Page, puppet: Puppet, reason: str, says: str
) -> None:
    await ask(page, "Count")
    (await puppet.reply()).say("one", End(reason)).end()
    await idle(page)
    await expect(note(page)).to_have_text(says)


async def test_refused_prompt_returns_to_text_box(page: Page, puppet: Puppet) -> None:
    long = "x" * 40_000  # over the prompt_size
    await ask(page, long)
    await expect(note(page)).to_contain_text("The prompt has 40,000 bytes; 32,768 are allowed.")
    await expect(box(page)).to_have_value(long)
    await idle(page)
    assert puppet.replies == []


async def test_prompt_closing_connection_is_not_resent(page: Page, puppet: Puppet) -> None:
    long = "x" * 70_000  # over the message_size
    await ask(page, long)
    await expect(note(page)).to_have_text(
        "This is too long for the server, which takes at most 32 KB. Shorten it."
    )
    await expect(box(page)).to_have_value(long)
    await ask(page, "Short")
    (await puppet.reply()).say("Fine").end()
    await expect(text(page)).to_have_text("Fine")


async def test_usage_of_a_reply_that_cost_nothing_is_not_shown(page: Page, puppet: Puppet) -> None:
    await ask(page, "Hello")
    (await puppet.reply()).fail(ModelError(Code.CREDENTIALS))
    await expect(note(page)).to_have_text(Code.CREDENTIALS.meaning)
    await expect(reply(page).locator(".usage")).to_have_text("puppet")
