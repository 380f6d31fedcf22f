"""The React hook, as `examples/react` uses it, in a real browser."""

import asyncio
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Page, expect

import wsserver
from tests.browser.client import ask, connect, end, says
from tests.browser.page import dismiss
from tests.support.bundle import bundle, example
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]
A, B, UNKNOWN = "conversation-of-a", "conversation-of-b", "conversation-unknown"


@pytest.fixture
def page(bare_page: Page) -> Page:
    return bare_page


@pytest.fixture(scope="session")
def app() -> str:
    """The example as a script: ``start(properties)``, and ``pick(conversation)`` later.

    ``conversation`` is the last one that the hook reported.
    """
    entry = """
        import { StrictMode } from 'react'
        import { createRoot } from 'react-dom/client'
        import { App } from './examples/react/App.jsx'
        const onConversation = (id) => { globalThis.conversation = id }
        globalThis.start = (properties) => {
          const root = createRoot(document.body.appendChild(document.createElement('div')))
          globalThis.pick = (conversation) => {
            const given = { ...properties, conversation, onConversation }
            root.render(<StrictMode><App {...given} /></StrictMode>)
          }
          pick(properties.conversation)
        }
    """
    return bundle(entry)


async def start(page: Page, app: str, **properties: str) -> None:
    await page.add_script_tag(content=app)
    await page.evaluate("properties => start(properties)", properties)
    await expect(page.get_by_role("status")).to_have_text("Connected")


async def test_example_keeps_its_conversation_over_a_reload(
    page: Page, server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    async with example("react", server, tmp_path) as address:
        await page.goto(address)
        await expect(page.get_by_role("status")).to_have_text("Connected")
        await type_in(page, "first")
        reply = (await puppet.reply()).say("one")
        await expect(page.get_by_role("listitem")).to_have_text(["first", "one"])
        await page.reload()
        await expect(page.get_by_role("listitem")).to_have_text(["first", "one"])
        reply.say(", two").end()
        await expect(page.get_by_role("listitem")).to_have_text(["first", "one, two"])


async def type_in(page: Page, text: str) -> None:
    await page.get_by_label("Your message").fill(text)
    await page.get_by_label("Your message").press("Enter")


async def test_hook_streams_and_stops_reply(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages, button = page.get_by_role("listitem"), page.get_by_role("button")
    await type_in(page, "Count")
    await expect(button).to_have_text("Stop")
    model = (await puppet.reply()).say("one ")
    await expect(messages).to_have_text(["Count", "one"])
    model.say("<b>two</b>")
    await expect(messages).to_have_text(["Count", "one <b>two</b>"])
    await button.click()
    await expect(messages).to_have_text(["Count", "one <b>two</b> (incomplete: client)"])
    await expect(button).to_have_text("Send")
    async with asyncio.timeout(BOUND):
        await model.closed.wait()
    await type_in(page, "Again")
    (await puppet.reply(1)).say("whole").end()
    await expect(messages).to_have_text(
        ["Count", "one <b>two</b> (incomplete: client)", "Again", "whole"]
    )
    await expect(button).to_have_text("Send")
    await type_in(page, "Fail")
    (await puppet.reply(2)).fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    await expect(page.get_by_role("alert")).to_contain_text("overloaded")
    await expect(button).to_have_text(["Send", "Retry"])


async def test_hook_joins_running_reply_of_other_page(
    page: Page, line: Line, puppet: Puppet, app: str
) -> None:
    await connect(page)
    await ask(page, "First")
    (await puppet.reply()).say("done").end()
    await end(page)
    await ask(page, "Second")
    model = (await puppet.reply(1)).say("one ")
    await says(page, "one ", 1)
    conversation = await page.evaluate("chat.conversation")
    await start(page, app, url=line.url, conversation=conversation)
    messages = page.get_by_role("listitem")
    await expect(messages).to_have_text(["First", "done", "Second", "one"])
    line.cut()
    await expect(page.get_by_role("status")).to_contain_text("Not connected")
    model.say("two").end()
    await end(page, 1)
    await ask(page, "Third")
    (await puppet.reply(2)).say("missed").end()
    await end(page, 2)
    line.mend()
    await expect(messages).to_have_text(["First", "done", "Second", "one two", "Third", "missed"])
    await expect(page.get_by_role("alert")).to_have_count(0)


async def pick(page: Page, conversation: str | None) -> None:
    await page.evaluate("id => pick(id ?? undefined)", conversation)


@pytest_asyncio.fixture(loop_scope="session")
async def two(page: Page, puppet: Puppet) -> None:
    """Two conversations, of one turn each."""
    await connect(page)
    for number, (prompt, conversation) in enumerate([("in A", A), ("in B", B)]):
        await ask(page, prompt, conversation)
        (await puppet.reply(number)).say(f"said {prompt}").end()
        await end(page, number)


@pytest.mark.usefixtures("two")
async def test_hook_clears_messages_when_conversation_changes(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url, conversation=A)
    messages, alert = page.get_by_role("listitem"), page.get_by_role("alert")
    await expect(messages).to_have_text(["in A", "said in A"])
    await pick(page, B)
    await expect(messages).to_have_text(["in B", "said in B"])
    await pick(page, UNKNOWN)
    await expect(alert).to_be_visible()
    await expect(messages).to_have_count(0)
    await expect(page.get_by_role("button")).to_have_text(["Send"])
    await pick(page, B)
    await expect(messages).to_have_text(["in B", "said in B"])
    await expect(alert).to_have_count(0)
    await pick(page, None)
    await expect(messages).to_have_count(0)
    await type_in(page, "new")
    (await puppet.reply(2)).say("begun").end()
    await expect(messages).to_have_text(["new", "begun"])
    assert [message.content for message in puppet.replies[2].request.messages] == ["new"]
    await pick(page, A)
    await expect(messages).to_have_text(["in A", "said in A"])


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("other", [B, UNKNOWN, None])
async def test_hook_hides_running_reply_of_former_conversation(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str, other: str | None
) -> None:
    await start(page, app, url=server.url, conversation=A)
    messages, button = page.get_by_role("listitem"), page.get_by_role("button")
    await expect(messages).to_have_count(2)
    await type_in(page, "long")
    model = (await puppet.reply(2)).say("one ")
    await expect(messages).to_have_text(["in A", "said in A", "long", "one"])
    await expect(button).to_have_text(["Stop"])
    await pick(page, other)
    await expect(button).to_have_text(["Send"])
    await expect(messages).to_have_text(["in B", "said in B"] if other == B else [])
    await expect(page.get_by_role("list")).to_have_attribute("aria-busy", "false")
    model.say("two ")
    await pick(page, A)
    await expect(messages).to_have_text(["in A", "said in A", "long", "one two"])
    await expect(button).to_have_text(["Stop"])
    await pick(page, other)
    await expect(button).to_have_text(["Send"])
    model.say("three").end()
    await until_ended(page, server)
    await expect(button).to_have_text(["Send"])
    await pick(page, A)
    await expect(messages).to_have_text(["in A", "said in A", "long", "one two three"])
    await expect(button).to_have_text(["Send"])


async def until_ended(page: Page, server: wsserver.Server) -> None:
    """Wait until no reply runs in A."""
    await page.evaluate(
        """async ([url, conversation]) => {
            const { connect } = await import('/client.js');
            const chat = connect(url);
            const { replies } = await chat.open(conversation);
            await Promise.all(replies.map(({ done }) => done));
            chat.close();
        }""",
        [server.url, A],
    )


async def test_hook_reports_conversation_for_reload(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages = page.get_by_role("listitem")
    await type_in(page, "first")
    model = (await puppet.reply()).say("one ")
    await expect(messages).to_have_text(["first", "one"])
    conversation = await page.evaluate("conversation")
    await pick(page, conversation)  # as an app with this state does
    model.say("two ")
    await expect(messages).to_have_text(["first", "one two"])
    await expect(page.get_by_role("button")).to_have_text(["Stop"])
    await page.reload()
    await start(page, app, url=server.url, conversation=conversation)
    model.say("three").end()
    await expect(messages).to_have_text(["first", "one two three"])
    await type_in(page, "second")
    said = (await puppet.reply(1)).request.messages
    assert [message.content for message in said] == ["first", "one two three", "second"]
    await page.evaluate("pick()")
    await expect(messages).to_have_count(0)


async def test_hook_retry_replaces_failed_turn(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages, retry = page.get_by_role("listitem"), page.get_by_role("button", name="Retry")
    await type_in(page, "Hello")
    (await puppet.reply()).say("half").fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    await retry.click()
    (await puppet.reply(1)).fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    await expect(messages).to_have_text(["Hello", "(incomplete: overloaded)"])
    await retry.click()
    (await puppet.reply(2)).say("whole").end()
    await expect(messages).to_have_text(["Hello", "whole"])
    await expect(retry).to_have_count(0)
    await expect(page.get_by_role("alert")).to_have_count(0)
    said = [[m.content for m in reply.request.messages] for reply in puppet.replies]
    assert said == [["Hello"]] * 3
    conversation = await page.evaluate("conversation")
    await page.reload()
    await start(page, app, url=server.url, conversation=conversation)
    await expect(messages).to_have_text(["Hello", "whole"])


async def test_hook_retries_refused_prompt(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages, retry = page.get_by_role("listitem"), page.get_by_role("button", name="Retry")
    long = "x" * 40_000
    await type_in(page, long)
    await expect(messages).to_have_text([long, "(incomplete: too_long)"])
    await retry.click()
    await expect(messages).to_have_text([long, "(incomplete: too_long)"])
    await type_in(page, "short")
    (await puppet.reply()).say("whole").end()
    await expect(messages).to_have_text([long, "(incomplete: too_long)", "short", "whole"])


async def test_hook_ends_reply_after_final_close_code(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    await type_in(page, "Hello")
    (await puppet.reply()).say("half")
    await expect(page.get_by_role("listitem")).to_have_text(["Hello", "half"])
    dismiss(server, 1008, "enough")
    await expect(page.get_by_role("alert")).to_contain_text("closed")
    await expect(page.get_by_role("button")).to_have_text(["Send", "Retry"])
    await expect(page.get_by_role("status")).to_have_text("Not connected: closed")
