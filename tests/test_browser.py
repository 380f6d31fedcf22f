"""The page at / and the ten-line client, in a real browser."""

import asyncio
import contextlib
import functools
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

import wsserver
from tests.support.client import client
from tests.support.process import Process, run
from tests.support.puppet import BOUND, Puppet, Thinking
from tests.support.tools import ROOT, require_chromium, require_npm_package
from wsserver import Code, End, ModelError, Request, Usage
from wsserver.errors import StoreError
from wsserver.stores import MemoryStore

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
TEN_LINES = ROOT / "examples/ten_lines.html"

# One event loop for all, so that one browser can serve all.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    expect.set_options(timeout=BOUND * 1000)
    yield
    expect.set_options(timeout=None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    path = require_chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def server(puppet: Puppet) -> AsyncIterator[wsserver.Server]:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def blank(browser: Browser, server: wsserver.Server) -> AsyncIterator[Page]:
    """An empty page. The test fails if any of its context complains, as it does where the policy
    is violated, or opens a dialog, as injected scripts do."""
    context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(BOUND * 1000)
    complaints: list[str] = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda message: complaints.append(message.text))
    context.on("dialog", lambda dialog: complaints.append(dialog.message))
    yield await context.new_page()
    await context.close()
    # The browser itself reports a server that is away.
    assert [text for text in complaints if not text.startswith("WebSocket connection to")] == []


@pytest_asyncio.fixture(loop_scope="module")
async def page(blank: Page, server: wsserver.Server) -> Page:
    await visit(blank, server)
    return blank


@pytest_asyncio.fixture(loop_scope="module")
async def timed(blank: Page, server: wsserver.Server) -> Page:
    """The page with its clock in the test's hands, stopped."""
    await blank.clock.install()
    await visit(blank, server)
    await stop_clock(blank)
    return blank


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


async def sends(page: Page) -> None:
    """Wait until there is nothing to stop."""
    await expect(button(page)).to_have_accessible_name("Send")


def reply(page: Page) -> Locator:
    return page.locator(".reply").last


def text(page: Page) -> Locator:
    return reply(page).locator(".text")


def note(page: Page) -> Locator:
    return reply(page).locator(".note")


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
    """Ask, and wait for the whole reply."""
    number = len(puppet.replies)
    await ask(page, prompt)
    (await puppet.reply(number)).say(said).end()
    await expect(text(page)).to_have_text(said)
    await sends(page)


def cut(server: wsserver.Server) -> None:
    """Break all connections, as a network does."""
    for connection in tuple(server._endpoint.connections):
        connection.abort()


async def closed(event: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND):
        await event.wait()


# A conversation.


async def test_a_reply_appears_as_it_is_made(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await expect(button(page)).to_have_accessible_name("Stop")
    await expect(reply(page)).to_have_attribute("aria-busy", "true")
    model.say("three", Usage(input_tokens=1234, output_tokens=5)).end()
    await expect(text(page)).to_have_text("one two three")
    await sends(page)
    await expect(reply(page)).to_have_attribute("aria-busy", "false")
    await expect(note(page)).to_be_empty()
    await expect(reply(page).locator(".usage")).to_have_text("puppet · 1,234 tokens in, 5 out")
    assert model.request.prompt == "Count"


async def test_the_conversation_goes_on(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    await converse(page, puppet, "Second", "Another")
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["First", "Reply", "Second"]
    await expect(page.get_by_role("region", name="Messages")).to_contain_text("First")


async def test_stop_stops_the_model_and_the_next_prompt_works(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await button(page).click()
    await closed(model.closed)
    await expect(note(page)).to_have_text("Stopped.")
    await expect(text(page)).to_have_text("one two")
    await sends(page)
    await box(page).fill("Again")
    await button(page).click()
    (await puppet.reply(1)).say("whole").end()
    await expect(text(page)).to_have_text("whole")
    await expect(note(page)).to_be_empty()


async def test_escape_stops(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = await puppet.reply()
    await page.keyboard.press("Escape")
    await closed(model.closed)
    await expect(note(page)).to_have_text("Stopped.")


async def test_a_double_click_on_send_does_not_stop(page: Page, puppet: Puppet) -> None:
    await box(page).fill("Count")
    await button(page).dblclick()
    (await puppet.reply()).say("one").end()
    await expect(text(page)).to_have_text("one")
    await sends(page)
    await expect(note(page)).to_be_empty()


async def test_shift_enter_breaks_the_line_and_the_box_grows(page: Page, puppet: Puppet) -> None:
    await box(page).fill("one")
    before = await box(page).bounding_box()
    await box(page).press("Shift+Enter")
    await box(page).press_sequentially("two")
    after = await box(page).bounding_box()
    assert before is not None
    assert after is not None
    assert after["height"] > before["height"]
    await box(page).press("Enter")
    model = await puppet.reply()
    model.end()
    assert model.request.prompt == "one\ntwo"
    await expect(box(page)).to_have_value("")


async def test_enter_sends_neither_blanks_nor_while_a_reply_streams(
    page: Page, puppet: Puppet
) -> None:
    await ask(page, " \n ")
    await ask(page, "Count")
    model = (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    await ask(page, "Draft")
    await expect(box(page)).to_have_value("Draft")
    model.end()
    await sends(page)
    await box(page).press("Enter")
    (await puppet.reply(1)).end()
    assert [model.request.prompt for model in puppet.replies] == ["Count", "Draft"]


async def test_thinking_is_folded_away(page: Page, puppet: Puppet) -> None:
    await ask(page, "Think")
    model = (await puppet.reply()).say(Thinking("Let me "), Thinking("see."))
    thinking = reply(page).locator("details p")
    await expect(thinking).to_have_text("Let me see.")
    await expect(thinking).not_to_be_visible()
    await page.get_by_text("Thinking…").click()
    await expect(thinking).to_be_visible()
    model.say("Seen.").end()
    await expect(text(page)).to_have_text("Seen.")
    await expect(reply(page).locator("summary")).to_have_text("Thought")
    await converse(page, puppet, "Do not think", "Done.")
    await expect(reply(page).locator("details")).not_to_be_visible()


async def test_a_reply_and_its_code_can_be_copied(page: Page, puppet: Puppet) -> None:
    whole = "Here:\n\n```py\nx = 1\n\ny = `2`\n```\nDone."
    await ask(page, "Code")
    (await puppet.reply()).say(whole).end()
    await sends(page)
    await page.get_by_role("button", name="Copy the code").click()
    assert await page.evaluate("navigator.clipboard.readText()") == "x = 1\n\ny = `2`\n"
    await page.get_by_role("button", name="Copy the reply").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == whole


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
        ("## A `b`\nc", "<h4>A <code>b</code></h4><p>c</p>"),
        ("#no\n-no\n1.no", "<p>#no\n-no\n1.no</p>"),
        ("**a b** *c* ``d`e``", "<p><strong>a b</strong> <em>c</em> <code>d`e</code></p>"),
        ("2 * 3 ** 4 a*b*c `d\n**e", "<p>2 * 3 ** 4 a*b*c `d\n**e</p>"),
        ("`**a**` **`b`**", "<p><code>**a**</code> <strong><code>b</code></strong></p>"),
        ("- a\n- b\n\nc", "<ul><li>a</li><li>b</li></ul><p>c</p>"),
        ("3. a\n   - b\n4. c", '<ol start="3"><li>a<ul><li>b</li></ul></li><li>c</li></ol>'),
        ("- a\n\n  b\n- c", "<ul><li>a<p>b</p></li><li>c</li></ul>"),
        ("a\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("```<b>\n**a**\n````\nb", "[&lt;b&gt;|**a**\n]<p>b</p>"),
        ("a\n```\n``\n`` `", "<p>a</p>[code|``\n`` `\n]"),
        ("````\n```\n````", "[code|```\n]"),
        ("1. a\n   ```js\n   b\n   ```\n2. c", "<ol><li>a[js|   b\n]</li><li>c</li></ol>"),
        ("``` not one ``` ok", "<p><code> not one </code> ok</p>"),
        ("<i>&lt;", "<p>&lt;i&gt;&amp;lt;</p>"),
        ("", ""),
    ],
)
async def test_text_gets_its_form_as_it_comes(page: Page, written: str, shown: str) -> None:
    """The same, whether it comes at once or character by character."""
    for size in (1, 2, 3, 1000):
        pieces = [written[at : at + size] for at in range(0, len(written), size)]
        got = await page.evaluate(
            """async (pieces) => {
                const { Formatter } = await import('/format.js')
                const root = document.createElement('div')
                const formatter = new Formatter(root)
                for (const piece of pieces) formatter.write(piece)
                formatter.end()
                for (const figure of root.querySelectorAll('figure')) {
                    const [language, code] = ['.language', 'code'].map((part) =>
                        figure.querySelector(part).textContent)
                    figure.replaceWith(`[${language}|${code}]`)
                }
                return root.innerHTML
            }""",
            pieces,
        )
        assert got == shown, size


@pytest.mark.parametrize(
    "character", [" ", "`", "*", "-", "#", "1", ">", "\n", "**a ", "- ", "`a` "]
)
async def test_no_text_takes_long(page: Page, character: str) -> None:
    took = await page.evaluate(
        """async (character) => {
            const { Formatter } = await import('/format.js')
            const began = performance.now()
            for (const opening of ['', '```\\n', 'a', '**']) {
                const formatter = new Formatter(document.createElement('div'))
                formatter.write(opening)
                for (let piece = 0; piece < 20; piece++) formatter.write(character.repeat(5000))
                formatter.write('x')
                formatter.end()
            }
            return performance.now() - began
        }""",
        character,
    )
    assert took < 3000


async def test_a_mark_without_its_end_goes_back_to_text_however_much_it_holds(page: Page) -> None:
    length = await page.evaluate(
        """async () => {
            const { Formatter } = await import('/format.js')
            const root = document.createElement('div')
            const formatter = new Formatter(root)
            formatter.write('**')
            for (let piece = 0; piece < 100; piece++) formatter.write('`a` '.repeat(1000))
            formatter.end()
            return [root.querySelectorAll('strong').length, root.textContent.length]
        }"""
    )
    assert length == [0, 2 + 2 * 100_000]


async def test_markup_stays_text(page: Page, puppet: Puppet) -> None:
    await ask(page, MARKUP)
    fenced = (
        f"{MARKUP}\n```{MARKUP}\n{MARKUP}\n```\n- {MARKUP}\n# {MARKUP}\n**{MARKUP}** `{MARKUP}`"
    )
    model = (await puppet.reply()).say(Thinking(MARKUP), fenced)
    model.fail(ModelError(Code.REFUSAL, MARKUP))
    await expect(note(page)).to_have_text(MARKUP)
    await expect(text(page)).to_contain_text(MARKUP)
    await expect(reply(page).locator("details p")).to_have_text(MARKUP)
    await expect(reply(page).locator("pre")).to_have_text(MARKUP)
    await expect(reply(page).locator(".language")).to_have_text(MARKUP)
    await expect(page.locator(".you p")).to_have_text(MARKUP)
    await rename(page, MARKUP)
    await expect(title(page)).to_have_text(MARKUP)
    await expect(rows(page).get_by_role("link")).to_have_text(MARKUP)
    await page.get_by_role("button", name=re.compile("^Delete")).click()
    await expect(page.get_by_role("dialog")).to_contain_text(MARKUP)
    await page.keyboard.press("Escape")
    await page.reload()
    await expect(text(page)).to_contain_text(MARKUP)
    await expect(page.locator("b, img, body script, [onerror]")).to_have_count(0)
    await expect(page.locator("#log a")).to_have_count(0)


# What goes wrong.


async def test_a_failed_reply_keeps_its_text_says_why_and_can_be_retried_in_time(
    timed: Page, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = (await puppet.reply()).say("Half an")
    model.fail(ModelError(Code.OVERLOADED, "It is busy.", retry_after=60))
    await expect(note(timed)).to_have_text("It is busy.")
    await expect(text(timed)).to_have_text("Half an")
    await sends(timed)
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
    for _ in range(2):  # also where the history tells of it
        await expect(timed.locator("article")).to_have_count(1)
        await expect(again).to_have_count(0)
        await timed.reload()
        await expect(text(timed)).to_have_text("Whole")


async def test_a_retry_takes_the_place_of_what_failed_on_every_page(
    page: Page, puppet: Puppet
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
    await tab.reload()  # while the retry is under way
    await expect(tab.locator(".text")).to_have_text(["Reply", "More"])
    model.say(" and all").end()
    for shown in (page, tab):
        await expect(shown.locator(".text")).to_have_text(["Reply", "More and all"])
        await expect(shown.locator(".you p")).to_have_text(["First", "Second"])
    await page.reload()
    await expect(page.locator(".text")).to_have_text(["Reply", "More and all"])
    assert [m.content for m in model.request.messages] == ["First", "Reply", "Second"]


async def test_a_retry_that_is_refused_can_be_tried_again_in_the_place_of_what_failed(
    blank: Page, puppet: Puppet
) -> None:
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
            await expect(note(blank)).to_contain_text("as many generations as it may")
            await other.send({"type": "stop"})
            await other.next("done")
        await again.click()
        (await puppet.reply(2)).say("Whole").end()
        await expect(blank.locator(".text")).to_have_text(["Whole"])
        assert [m.content for m in puppet.replies[2].request.messages] == ["Count"]


async def test_what_was_refused_for_now_is_asked_again_in_its_place(
    blank: Page, puppet: Puppet
) -> None:
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
        await expect(note(blank)).not_to_be_empty()  # as the server's clock goes on as ever
        await expect(blank.locator("article")).to_have_count(2)


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("end_turn", ""),
        ("max_tokens", "Cut short, as it reached the longest length allowed."),
        ("pause_turn", "Ended early: pause turn."),
    ],
)
async def test_an_early_end_is_noted(page: Page, puppet: Puppet, reason: str, says: str) -> None:
    await ask(page, "Count")
    (await puppet.reply()).say("one", End(reason)).end()
    await sends(page)
    await expect(note(page)).to_have_text(says)


async def test_what_the_server_refuses_goes_back_into_the_box(page: Page, puppet: Puppet) -> None:
    long = "x" * 40_000  # over the prompt_size
    await ask(page, long)
    await expect(note(page)).to_contain_text("The prompt has 40000 bytes; 32768 are allowed.")
    await expect(box(page)).to_have_value(long)
    await sends(page)
    assert puppet.replies == []


async def test_what_the_server_hangs_up_on_is_not_sent_again(page: Page, puppet: Puppet) -> None:
    long = "x" * 70_000  # over the message_size
    await ask(page, long)
    await expect(note(page)).to_have_text("This is too long for the server.")
    await expect(box(page)).to_have_value(long)
    await ask(page, "Short")
    (await puppet.reply()).say("Fine").end()
    await expect(text(page)).to_have_text("Fine")


# The connection.


async def test_a_reply_goes_on_after_a_lost_connection(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = (await puppet.reply()).say(Thinking("Hm. "), "one ", "two ")
    await expect(text(timed)).to_have_text("one two")
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await expect(note(timed)).to_contain_text("Cut off, as the connection was lost.")
    await expect(text(timed)).to_have_text("one two")
    model.say(Thinking("Well. "), "three ")  # said to nobody
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(state(timed)).to_have_text("Connected")
    await expect(text(timed)).to_have_text("one two three")
    await expect(note(timed)).to_be_empty()
    model.say("four").end()
    await sends(timed)
    await expect(text(timed)).to_have_text("one two three four")
    await expect(reply(timed).locator("details p")).to_have_text("Hm. Well.")
    await expect(timed.locator("article")).to_have_count(1)
    assert len(puppet.replies) == 1

    await ask(timed, "And on")  # in the same conversation, though over another socket
    (await puppet.reply(1)).end()
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["Count", "one two three four", "And on"]


async def test_a_reply_that_ended_meanwhile_is_shown_whole(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    cut(server)
    model.say("two").end()
    await sends(page)
    await expect(text(page)).to_have_text("one two")
    await expect(note(page)).to_be_empty()
    await expect(page.locator("article")).to_have_count(1)
    assert len(puppet.replies) == 1


async def test_a_machine_that_goes_offline_comes_back_by_itself(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await page.context.set_offline(True)
    cut(server)
    await expect(state(page)).to_have_text(re.compile(r"trying again…|Connecting…"))
    await expect(note(page)).to_contain_text("Cut off")
    model.say("two ")
    await page.context.set_offline(False)
    await expect(text(page)).to_have_text("one two")
    model.end()
    await sends(page)
    await expect(note(page)).to_be_empty()


async def test_what_others_said_meanwhile_is_there_after_a_lost_connection(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First")
    conversation = timed.url.partition("#")[2]
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    async with client(server) as other:
        start = await other.prompt("Second", conversation=conversation)
        (await puppet.reply(1)).say("Meanwhile").end()
        await other.text(start["id"])
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(timed.locator(".you p")).to_have_text(["First", "Second"])
    await expect(timed.locator(".text")).to_have_text(["Reply", "Meanwhile"])


async def test_what_others_deleted_meanwhile_stays_in_view_and_is_told(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First")
    conversation = timed.url.partition("#")[2]
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    async with client(server) as other:
        await other.send({"type": "delete", "conversation": conversation})
        await other.next("deleted")
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(alert(timed)).to_contain_text("no longer has this conversation")
    await expect(text(timed)).to_have_text("Reply")
    await converse(timed, puppet, "Second", "Afresh")
    assert [message.content for message in puppet.replies[1].request.messages] == ["Second"]
    await expect(alert(timed)).to_be_hidden()


async def test_stop_works_without_a_connection(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = await puppet.reply()
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await timed.keyboard.press("Escape")
    await timed.clock.resume()
    await expect(note(timed)).to_have_text("Stopped.")
    await sends(timed)
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await closed(model.closed)


async def test_a_prompt_written_while_the_server_is_away_is_sent_once_it_is_back(
    blank: Page,
) -> None:
    await blank.add_init_script("Math.random = () => 0")  # no pauses
    async with wsserver.serve(Puppet(), port=0) as first:
        port = first.port
        await visit(blank, first)
    await ask(blank, "Hello")
    await expect(note(blank)).to_have_text("Not sent yet.")
    model = Puppet()
    async with wsserver.serve(model, port=port):
        (await model.reply()).say("Back").end()
        await expect(text(blank)).to_have_text("Back")
        await expect(note(blank)).to_be_empty()


async def test_a_page_that_is_turned_away_does_not_come_back(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = await puppet.reply()
    for connection in server._connections:
        connection.end(1008, "too many unusable frames")
    await expect(state(page)).to_have_text(
        "The server closed the connection: too many unusable frames. "
        "Reload the page to connect again."
    )
    await expect(note(page)).to_contain_text("The connection was closed")
    await expect(box(page)).to_be_disabled()
    model.end()


async def test_a_shutdown_is_told(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "Count")
    (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    await server.close()
    await expect(note(page)).to_have_text("Stopped, as the server shut down.")
    await expect(text(page)).to_have_text("one")
    await expect(state(page)).to_have_text(re.compile(r"trying again…|Connecting…"))


async def test_a_server_that_is_killed_and_started_again(blank: Page, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'chat.sqlite'}"
    where = ("--port", str(port), "--store", store)
    serve = ("-m", "wsserver", "serve", *where, "--demo-rate", "20")

    async def started(process: Process) -> str:
        return (await process.line(r"http://\S+"))[0].rstrip("/")

    async with run(*serve, PYTHONPATH=str(ROOT)) as process:
        await blank.goto(await started(process))
        await ask(blank, "Hello")
        await expect(text(blank)).to_contain_text("from your own")
        process.signal(signal.SIGKILL)
        await process.end()
    await expect(note(blank)).to_contain_text("Cut off, as the connection was lost.")
    before = await text(blank).inner_text()
    async with run(*serve, PYTHONPATH=str(ROOT)) as process:
        await started(process)
        await expect(note(blank)).not_to_contain_text("Cut off")
        await expect(blank.get_by_role("button", name="Retry")).to_be_visible()
        assert (await text(blank).inner_text()).startswith(before[:50])
        await ask(blank, "What did I just say?")
        await expect(text(blank)).to_contain_text("You said: “Hello”")
        await sends(blank)
        await blank.reload()
        await expect(text(blank)).to_contain_text("You said: “Hello”")
        first = blank.locator(".reply").first
        await expect(first.locator(".note")).to_have_text("Broken off, as the server went away.")


# Conversations.


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


async def test_a_page_that_is_loaded_again_goes_on_mid_sentence(page: Page, puppet: Puppet) -> None:
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
    await sends(page)
    await converse(page, puppet, "Third", "Done")
    said = [message.content for message in puppet.replies[2].request.messages]
    assert said == ["First", "Reply", "Count", "one two three", "Third"]


async def test_two_tabs_show_the_same_and_either_stops_it(page: Page, puppet: Puppet) -> None:
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
        await sends(each)
    await ask(tab, "Again")  # which the first tab sees too
    (await puppet.reply(1)).say("whole").end()
    for each in (page, tab):
        await expect(each.locator(".you p")).to_have_text(["Count", "Again"])
        await expect(text(each)).to_have_text("whole")
        await sends(each)


async def test_the_address_names_the_conversation(page: Page, puppet: Puppet) -> None:
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


async def test_a_reply_goes_on_while_another_conversation_is_open(
    page: Page, puppet: Puppet
) -> None:
    await ask(page, "First one")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await page.get_by_role("link", name="New conversation").click()
    await sends(page)
    await converse(page, puppet, "Second one", "Reply to the second")
    model.say("two ")
    await expect(page.locator(".text")).to_have_text(["Reply to the second"])
    await page.get_by_role("link", name="First one").click()
    await expect(page.locator(".text")).to_have_text(["one two"])
    model.say("three").end()
    await expect(text(page)).to_have_text("one two three")


async def test_what_is_not_sent_yet_is_there_still_when_one_comes_back_to_it(
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
    await expect(timed.locator("article")).to_have_count(0)  # as it cannot be had now
    await timed.get_by_role("link", name="Second one").click()
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    (await puppet.reply(2)).say("Sent").end()
    await expect(timed.locator(".you p")).to_have_text(["Second one", "Unsent"])
    await expect(text(timed)).to_have_text("Sent")
    said = [message.content for message in puppet.replies[2].request.messages]
    assert said == ["Second one", "Reply", "Unsent"]


async def test_a_title_is_not_lost_while_it_is_written(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First one")
    tab = await second_tab(page, page.url.partition("#")[0])
    await page.bring_to_front()
    await page.get_by_role("button", name="Rename “First one”").click()
    field = page.get_by_role("textbox", name="Title")
    await field.fill("Half")
    await converse(tab, puppet, "Second one")  # which comes first in the list then
    await expect(rows(tab)).to_have_count(2)
    await expect(field).to_have_value("Half")
    await field.press("End")
    await field.press_sequentially(" a title")
    await field.press("Enter")
    for each in (page, tab):
        await expect(rows(each).get_by_role("link")).to_have_text(["Second one", "Half a title"])


async def test_an_address_of_nothing_is_told(page: Page, server: wsserver.Server) -> None:
    await page.goto(f"{server.page}#{'x' * 32}")
    await expect(alert(page)).to_have_text("There is no such conversation.")
    await expect(title(page)).to_have_text("New conversation")
    assert "#" not in page.url


async def test_what_has_no_reply_and_what_was_cut_is_told(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "Silence", "")
    await ask(page, "Much")
    (await puppet.reply(1)).say(*["word " * 1000] * 80).end()
    await sends(page)
    await converse(page, puppet, "Little")
    await page.reload()
    shown = ["Silence", "Much", "Little"]
    for number in (2, 1):  # as each frame has but one of these
        await expect(page.locator(".you p")).to_have_text(shown[number:])
        await page.get_by_role("button", name="Show earlier messages").click()
    await expect(page.locator(".you p")).to_have_text(shown)
    await expect(page.locator(".note").first).to_have_text("There is no reply.")
    await expect(page.locator(".note").nth(1)).to_contain_text("Shortened here")
    await expect(page.locator("[aria-busy=true]")).to_have_count(0)


async def test_a_conversation_is_renamed_in_its_place(page: Page, puppet: Puppet) -> None:
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


async def test_a_page_that_rests_unseen_is_not_woken_by_other_tabs(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await expect(rows(tab)).to_have_count(1)
    for connection in server._connections:
        connection.end(1000, "idle")
    for each in (page, tab):
        await expect(state(each)).to_have_text("Resting until you ask")
    await tab.evaluate("""() => {
        Object.defineProperty(document, 'visibilityState', { value: 'hidden' });
        const others = new BroadcastChannel('wsserver');
        window.heard = new Promise((resolve) => { others.onmessage = () => resolve(true); });
    }""")
    await rename(page, "Second")
    await tab.evaluate("heard")
    await expect(state(page)).to_have_text("Connected")
    assert await state(tab).text_content() == "Resting until you ask"


async def test_what_another_browser_deletes_is_gone(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    await expect(rows(page)).to_have_count(1)
    async with client(server) as other:
        await other.send({"type": "delete", "conversation": page.url.partition("#")[2]})
        await other.next("deleted")
    await expect(rows(page)).to_have_count(0)
    await expect(page.get_by_text("This conversation was deleted.")).to_be_visible()


async def test_what_cannot_be_renamed_is_told(
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


async def test_a_conversation_is_deleted_only_if_that_is_confirmed(
    page: Page, puppet: Puppet
) -> None:
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


async def test_there_are_more_conversations_to_be_had(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as other:
        for number in range(32):
            start = await other.prompt(f"Number {number}", conversation=f"{number:032}")
            (await puppet.reply(number)).end()
            await other.text(start["id"])
    await page.reload()
    await expect(rows(page)).to_have_count(30)
    await page.get_by_role("button", name="Show older ones").click()
    await expect(rows(page)).to_have_count(32)
    await expect(page.get_by_role("link", name="Number 1", exact=True)).to_be_focused()
    await expect(page.get_by_role("button", name="Show older ones")).to_be_hidden()
    await converse(page, puppet, "One more")
    await expect(rows(page)).to_have_count(33)
    await expect(rows(page).first).to_have_text("One more")


async def test_there_are_earlier_messages_to_be_had(blank: Page, puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0, history_messages=4) as server:
        await visit(blank, server)
        for number in range(5):
            await converse(blank, puppet, f"Question {number}", f"Answer {number}\n" * 30)
        await blank.reload()
        earlier = blank.get_by_role("button", name="Show earlier messages")
        await expect(earlier).to_be_visible()
        shown = await blank.locator("article").count()
        # The page learns of it with the next frame, and follows the newest message until then.
        await blank.evaluate(
            "new Promise((resolve) => { addEventListener('scroll', resolve, {once: true}); "
            "scrollTo(0, 0) })"
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


# How it looks and what it may do.


async def test_the_policy_stops_what_is_not_the_page_s_own(
    browser: Browser, server: wsserver.Server
) -> None:
    page = await browser.new_page()
    await visit(page, server)
    violated = await page.evaluate("""() => new Promise((resolve) => {
        const violated = [];
        addEventListener('securitypolicyviolation', (event) => {
            violated.push(event.effectiveDirective);
            if (violated.length === 7) resolve(violated.sort());
        });
        const add = (name, values) => document.body.append(
            Object.assign(document.createElement(name), values));
        const taken = (how) => { try { how() } catch { } };
        taken(() => add('script', { textContent: 'document.title = "Taken over"' }));
        taken(() => { document.body.innerHTML = '<img src=x>' });
        taken(() => {
            const script = document.createElement('script');
            script.append('document.title = "Taken over"');
            document.body.append(script);
        });
        add('style', { textContent: 'body { display: none }' });
        add('img', { src: 'https://example.invalid/' });
        new WebSocket('wss://example.invalid/').onerror = () => {};
        const button = document.createElement('button');
        document.body.append(button);
        button.setAttribute('style', 'color: red');
    })""")
    assert violated == [
        *("connect-src", "img-src"),
        *["require-trusted-types-for"] * 3,
        *("style-src-attr", "style-src-elem"),
    ]
    await expect(page).to_have_title("wsserver")
    await page.close()


@pytest.mark.parametrize("width", [320, 360, 390])
async def test_it_fits_a_phone(page: Page, puppet: Puppet, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 844})
    await ask(page, "x" * 300)
    code = f"\n```\n{'w' * 300}\n```\n`{'v' * 300}`"
    (await puppet.reply()).say(Thinking("y" * 300), "z" * 300, code).end()
    await page.get_by_text("Thought").click()
    await sends(page)
    assert await page.evaluate("document.documentElement.scrollWidth") == width
    await expect(button(page)).to_be_in_viewport(ratio=1)
    await expect(rows(page)).to_have_count(0)  # for those who see, and for all others
    await page.get_by_role("button", name="Conversations").click()
    await expect(page.get_by_role("button", name="Close the list")).to_be_focused()
    await expect(rows(page)).to_have_count(1)
    await expect(page.get_by_role("main")).to_have_attribute("inert", "")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Conversations")).to_be_focused()
    await page.get_by_role("button", name="Conversations").click()
    await page.get_by_role("link", name="New conversation").click()
    await expect(box(page)).to_be_focused()
    await expect(page.locator("article")).to_have_count(0)


async def test_it_follows_dark_mode(page: Page) -> None:
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(colour)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(colour) != light


async def test_it_follows_the_text_unless_the_reader_has_scrolled_away(
    page: Page, puppet: Puppet
) -> None:
    await page.set_viewport_size({"width": 390, "height": 400})
    jump = page.get_by_role("button", name="Jump to the end")
    await ask(page, "Count")
    model = (await puppet.reply()).say("line\n" * 100)
    await expect(text(page)).to_contain_text("line")
    end = text(page).locator("p").last
    await expect(end).to_be_in_viewport()
    await expect(jump).to_be_hidden()
    await page.evaluate("scrollTo(0, 100)")
    await expect(jump).to_be_visible()
    model.say("more\n" * 100)
    await expect(text(page)).to_contain_text("more")
    assert await page.evaluate("scrollY") == 100
    await jump.click()
    await expect(jump).to_be_hidden()
    await expect(box(page)).to_be_focused()
    model.say("and more\n" * 100, "\nend")
    await expect(text(page)).to_contain_text("end")
    await expect(end).to_be_in_viewport()
    await page.mouse.move(200, 150)
    await page.mouse.wheel(0, -20)  # a little is enough
    await expect(jump).to_be_visible()
    where = await page.evaluate("scrollY")
    model.say("\n\nlast" * 10).end()
    await sends(page)
    assert await page.evaluate("scrollY") <= where


async def test_what_is_unfolded_stays_in_view(page: Page, puppet: Puppet) -> None:
    await page.set_viewport_size({"width": 390, "height": 500})
    await ask(page, "Think")
    (await puppet.reply()).say(Thinking("hm\n" * 100), "line\n" * 5).end()
    await sends(page)
    await page.get_by_text("Thought").click()
    await expect(page.get_by_text("Thought")).to_be_in_viewport()
    await expect(page.get_by_role("button", name="Jump to the end")).to_be_visible()


async def test_it_keeps_up_with_a_fast_model(blank: Page) -> None:
    """Three seconds of 3,000 tokens each, and then as many as fast as they come."""
    words = ["**fast** ", "and `so` ", "on, ", *["word "] * 60, "\n\n", "- item\n", "```py\n"]
    words += ["x = 1\n"] * 20 + ["```\n"]

    async def model(request: Request) -> AsyncGenerator[str]:
        began = time.monotonic()
        for number in range(9_000):
            yield words[number % len(words)]
            ahead = number / 3_000 - (time.monotonic() - began)
            if request.prompt == "steady" and ahead > 0:
                await asyncio.sleep(ahead)

    settings: dict[str, Any] = {"max_tokens": 100_000, "max_tokens_limit": 100_000}
    async with wsserver.serve(model, port=0, drain_timeout=0, **settings) as server:
        await visit(blank, server)
        await blank.evaluate("""() => {
            globalThis.long = []
            globalThis.frames = []
            new PerformanceObserver((list) => long.push(...list.getEntries()))
                .observe({ type: 'longtask' })
            let last = performance.now()
            const frame = (now) => {
                frames.push(now - last)
                last = now
                requestAnimationFrame(frame)
            }
            requestAnimationFrame(frame)
        }""")
        for prompt in ("steady", "at once"):
            await ask(blank, prompt)
            began = time.monotonic()
            await expect(reply(blank)).to_have_attribute("aria-busy", "false", timeout=BOUND * 3000)
            took = time.monotonic() - began
            long, frames = await blank.evaluate("""() => [
                long.splice(0).map(({ duration }) => Math.round(duration)),
                frames.splice(0).sort((a, b) => a - b).map(Math.round),
            ]""")
            print(
                f"{prompt}: {9_000 / took:.0f} tokens/s; long tasks: {long} ms; "
                f"{len(frames)} frames, the longest {frames[-5:]} ms"
            )
            assert len(long) <= 3, long  # of a machine that has other things to do as well
        shown = await text(blank).inner_text()
        assert shown.count("fast") == 9_000 // len(words) + 1


# Whoever uses it.


async def violations(page: Page) -> list[str]:
    """What axe-core finds wrong."""
    source = (require_npm_package("axe-core") / "axe.min.js").read_text()
    await page.evaluate(f"() => {{ if (!globalThis.axe) {{ {source} }} }}")
    found = await page.evaluate("async () => (await axe.run()).violations")
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
async def test_axe_finds_nothing(
    timed: Page, server: wsserver.Server, puppet: Puppet, width: int, scheme: Any
) -> None:
    page = timed
    await page.clock.resume()
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": width, "height": 700})
    assert await violations(page) == []
    await ask(page, "Think")
    written = f"# A\n\n- **b** `c`\n\n```js\n{'d' * 300}\n```\nOn"
    model = (await puppet.reply()).say(Thinking("Hm."), written)
    await expect(text(page)).to_contain_text("On")
    await page.get_by_text("Thought").click()
    assert await violations(page) == [], "mid-stream"
    model.fail(ModelError(Code.OVERLOADED, "It is busy.", retry_after=60))
    await expect(page.get_by_role("button", name="Retry in")).to_be_visible()
    await ask(page, "Count")
    (await puppet.reply(1)).say("line\n" * 100)
    await expect(text(page)).to_contain_text("line")
    await page.keyboard.press("Escape")
    await expect(note(page)).to_have_text("Stopped.")
    await page.evaluate("scrollTo(0, 0)")
    await expect(page.get_by_role("button", name="Jump to the end")).to_be_visible()
    assert await violations(page) == [], "with an error"
    if width < 400:
        await page.get_by_role("button", name="Conversations").click()
        await expect(rows(page)).to_have_count(1)
        assert await violations(page) == [], "with the list"
    await page.get_by_role("button", name=re.compile("^Rename")).click()
    assert await violations(page) == [], "while renaming"
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name=re.compile("^Delete")).click()
    assert await violations(page) == [], "with a dialog"
    await page.keyboard.press("Escape")
    await stop_clock(page)
    cut(server)
    await expect(state(page)).to_have_text("Not connected, trying again…")
    await page.clock.resume()
    assert await violations(page) == [], "offline"


async def test_a_keyboard_is_enough(page: Page, puppet: Puppet) -> None:
    press = page.keyboard.press
    await expect(box(page)).to_be_focused()
    await page.keyboard.type("First")
    await press("Enter")
    (await puppet.reply()).say("line\n" * 100, "```\ncode\n```").end()
    await sends(page)

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


async def test_a_screen_reader_is_told_the_whole_reply_and_not_each_word(
    page: Page, puppet: Puppet
) -> None:
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
    await sends(page)
    await expect(page.locator("#heard")).to_have_text("one two three")
    assert [words.strip() for words in await page.evaluate("said")] == ["Sent.", "one two three"]
    live = page.locator("#log[aria-live], #log [aria-live], #log [role=log]")
    await expect(live).to_have_count(0)


async def test_it_moves_nothing_for_those_who_want_that(page: Page, puppet: Puppet) -> None:
    await page.emulate_media(reduced_motion="reduce")
    await ask(page, "Count")
    (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    assert await page.evaluate("document.getAnimations().length") == 0
    await page.emulate_media(reduced_motion="no-preference")
    assert await page.evaluate("document.getAnimations().length") > 0


# The ten-line client.


@contextlib.contextmanager
def website(folder: Path) -> Iterator[int]:
    """Serve files as `python -m http.server` does, and give the port."""
    handler = functools.partial(SilentFiles, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site.server_address[1]
        finally:
            site.shutdown()
            thread.join()


class SilentFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest_asyncio.fixture(loop_scope="module")
async def ten_lines(blank: Page, server: wsserver.Server, tmp_path: Path) -> AsyncIterator[Page]:
    """It, from a web server of its own, with the port of the test's server."""
    source = TEN_LINES.read_text()
    assert source.count("ws://localhost:3001") == 1
    copy = tmp_path / "ten_lines.html"
    copy.write_text(source.replace("ws://localhost:3001", server.url.rstrip("/")))
    (tmp_path / "favicon.ico").touch()
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/ten_lines.html")
        await blank.wait_for_function("ws.readyState === WebSocket.OPEN")
        yield blank


async def test_ten_lines_are_a_client(ten_lines: Page, puppet: Puppet) -> None:
    output = ten_lines.locator("pre")
    await ten_lines.get_by_label("Prompt").fill("Count")
    await ten_lines.get_by_role("button", name="Send").click()
    model = (await puppet.reply()).say("one ", "two ")
    await expect(output).to_have_text("one two")
    await ten_lines.get_by_role("button", name="Stop").click()
    await closed(model.closed)
    await expect(output).to_have_text("one two [stopped]")
    await ten_lines.get_by_role("button", name="Send").click()
    (await puppet.reply(1)).say(MARKUP).end()
    await expect(output).to_have_text(f"one two [stopped] {MARKUP} [end_turn]")
    await ten_lines.get_by_role("button", name="Stop").click()
    await expect(output).to_contain_text("nothing (of that `id`) to stop")


# Without an icon of its own it would have the browser ask for one, perhaps as the site goes.
HIJACK = """<link rel="icon" href="data:,">
<script>
const ws = new WebSocket('%s');
ws.onopen = () => { document.title = 'open'; ws.send('{"type":"list"}'); };
ws.onmessage = ({ data }) => { document.title = data; };
ws.onclose = ({ code }) => { document.title = `closed ${code}`; };
</script>"""


@pytest.mark.parametrize(
    ("page_host", "server_host", "status"),
    [
        ("evil.test", "localhost", 403),  # a page elsewhere (cross-site hijacking)
        ("evil.test", "127.0.0.1", 403),
        ("evil.test", "evil.test", 421),  # a name that leads here (DNS rebinding)
    ],
)
async def test_a_page_elsewhere_cannot_use_the_server(
    server: wsserver.Server, tmp_path: Path, page_host: str, server_host: str, status: int
) -> None:
    """In a browser for which a foreign name leads to this machine."""
    (tmp_path / "index.html").write_text(HIJACK % f"ws://{server_host}:{server.port}/ws")
    rules = "MAP evil.test 127.0.0.1"
    args = [*SWITCHES, f"--host-resolver-rules={rules}", "--no-proxy-server"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=require_chromium(), args=args)
        page = await browser.new_page()
        with website(tmp_path) as port:
            await page.goto(f"http://{page_host}:{port}/")
            await expect(page).to_have_title("closed 1006")
        await browser.close()
    exposition = server.metrics.exposition().decode()
    why = {403: "origin", 421: "host"}[status]
    assert f'wsserver_connections_total{{outcome="{why}"}} 1.0' in exposition
    assert 'wsserver_connections_total{outcome="served"} 0.0' in exposition


async def test_a_page_of_localhost_can(
    server: wsserver.Server, blank: Page, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(HIJACK % server.url)
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/")
        await expect(blank).to_have_title('{"type":"conversations","items":[]}')


async def test_the_page_asks_for_a_token_where_one_is_wanted(puppet: Puppet, blank: Page) -> None:
    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token == "sesame" else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        field = blank.get_by_label("Your token")
        await expect(field).to_be_focused()
        assert await violations(blank) == []
        await field.fill("wrong")
        await field.press("Enter")
        await expect(state(blank)).to_contain_text("your token is not good")
        await expect(field).to_be_focused()
        await field.fill("sesame")
        await field.press("Enter")
        await expect(field).to_be_hidden()
        await expect(box(blank)).to_be_focused()
        await ask(blank, "Hello")
        (await puppet.reply()).say("Hi ada").end()
        await expect(text(blank)).to_have_text("Hi ada")
        await sends(blank)
        await blank.reload()  # it remembers
        await expect(text(blank)).to_have_text("Hi ada")
        await ask(blank, "Again")
        (await puppet.reply(1)).say("Hi again").end()
        await expect(text(blank)).to_have_text("Hi again")
        await expect(field).to_be_hidden()


async def test_a_browser_that_lets_nothing_be_kept_will_do(puppet: Puppet, blank: Page) -> None:
    await blank.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } })"
    )

    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token == "sesame" else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        await blank.get_by_label("Your token").fill("sesame")
        await blank.get_by_label("Your token").press("Enter")
        await converse(blank, puppet, "Hello")


async def test_a_token_that_one_tab_was_given_is_good_for_the_others(
    puppet: Puppet, blank: Page
) -> None:
    good = {"old"}

    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token in good else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        tab = await blank.context.new_page()
        for each in (blank, tab):
            await each.goto(server.page)
            await expect(each.get_by_label("Your token")).to_be_visible()
        await blank.get_by_label("Your token").fill("old")
        await blank.get_by_label("Your token").press("Enter")
        await expect(state(tab)).to_have_text("Connected")
        await expect(tab.get_by_label("Your token")).to_be_hidden()
        await converse(tab, puppet, "Hello")
        good.clear()
        cut(server)
        for each in (blank, tab):
            await expect(each.get_by_label("Your token")).to_be_visible()
            await expect(state(each)).to_contain_text("your token is not good")
        await expect(text(tab)).to_have_text("Reply")  # and can still be read
        good.add("new")
        await tab.get_by_label("Your token").fill("new")
        await tab.get_by_label("Your token").press("Enter")
        await expect(state(blank)).to_have_text("Connected")
        await converse(tab, puppet, "Again")


async def test_the_first_lines_of_the_readme_are_a_client(
    blank: Page, server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```js\n(const ws = .*?)```", readme, re.DOTALL)
    begin, listen, ask_, *_, halt = snippet.strip().splitlines()
    begin = begin.replace("ws://localhost:3001", server.url)
    (tmp_path / "favicon.ico").touch()
    (tmp_path / "index.html").write_text(
        "<script>const prompt_ = 'Hello'; const append = (text) => { document.title += text; };\n"
        f"{begin}\n{listen}\nws.onopen = () => {{ {ask_.replace('prompt', 'prompt: prompt_')} \n}};"
        f"const halt = () => {{ {halt} }};</script>"
    )
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/")
        model = (await puppet.reply()).say("one-", "two")
        assert model.request.prompt == "Hello"
        await expect(blank).to_have_title("one-two")
        await blank.evaluate("halt()")
        await closed(model.closed)


async def test_ten_lines_are_ten() -> None:
    script = re.findall("<script>\n(.*?)</script>", TEN_LINES.read_text(), re.DOTALL)
    assert [len(found.splitlines()) for found in script] == [10]
    assert wsserver.Settings.load().port == 3001
