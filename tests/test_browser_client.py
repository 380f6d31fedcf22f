"""The client in JavaScript in a real browser."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

import wsserver
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet, Thinking
from tests.support.tools import ROOT, require_chromium, require_npm_package
from tests.test_browser import SWITCHES

# One event loop for all, so that one browser can serve all.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

NEVER = {"firstPause": 10**9, "longestPause": 10**9}  # comes back only when there is a reason to


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
async def line(server: wsserver.Server) -> AsyncIterator[Line]:
    async with Line(server.port) as line:
        yield line


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, server: wsserver.Server) -> AsyncIterator[Page]:
    """A page of the server's that has no script of its own."""
    page = await browser.new_page()
    page.set_default_timeout(BOUND * 1000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(server.page + "healthz")
    yield page
    await page.close()
    assert complaints == []


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    expect.set_options(timeout=BOUND * 1000)
    yield
    expect.set_options(timeout=None)


async def connect(page: Page, url: str | None = None, **options: Any) -> None:
    await page.evaluate(
        """async ([url, options]) => {
            const { connect } = await import('/client.js');
            globalThis.chat = connect(url ?? undefined, options);
            globalThis.replies = [];
            globalThis.ask = (...given) => { replies.push(chat.prompt(...given)); };
        }""",
        [url, options],
    )


async def ask(page: Page, prompt: str, conversation: str | None = None) -> None:
    options = {} if conversation is None else {"conversation": conversation}
    await page.evaluate("given => ask(...given)", [prompt, options])


async def says(page: Page, text: str, number: int = 0) -> None:
    await page.wait_for_function("([n, text]) => replies[n].text === text", arg=[number, text])


async def state(page: Page, wanted: str) -> None:
    await page.wait_for_function("wanted => chat.state === wanted", arg=wanted)


async def end(page: Page, number: int = 0) -> Any:
    return await page.evaluate(
        "n => replies[n].done.then(({ reason }) => reason, ({ code }) => code)", number
    )


async def test_a_prompt_and_a_stop_on_the_page_itself(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await page.goto(server.page)  # whose policy has to allow it
    await connect(page)
    await ask(page, "Count")
    model = (await puppet.reply()).say(Thinking("Hm."), "one ", "two")
    await says(page, "one two")
    read = page.evaluate("""async () => {
        const pieces = [];
        for await (const piece of replies[0]) pieces.push(piece);
        return pieces.join('');
    }""")
    reading = asyncio.ensure_future(read)
    await page.evaluate("replies[0].stop()")
    async with asyncio.timeout(BOUND):
        await model.closed.wait()
        assert await reading == "one two"
    assert await end(page) == "stopped"
    assert await page.evaluate("replies[0].thinking") == "Hm."


async def test_the_lines_in_the_readme_work(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## In a browser\n")[2]
    (lines,) = re.findall(r"```js\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    for name, here in (("'./client.js'", "'/client.js'"), ("ws://localhost:3001", server.url)):
        assert lines.count(name) == 1
        lines = lines.replace(name, here)
    await page.add_script_tag(
        type="module",
        content=f"""
            const freshToken = async () => 'sesame';
            const output = document.body.appendChild(document.createElement('output'));
            const stopButton = document.body.appendChild(document.createElement('button'));
            {lines}
            document.title = reason;
        """,
    )
    model = (await puppet.reply()).say("Once <b>upon</b>")
    await expect(page.locator("output")).to_have_text("Once <b>upon</b>")
    await page.locator("button").click()
    async with asyncio.timeout(BOUND):
        await model.closed.wait()
    await expect(page).to_have_title("stopped")


async def test_two_replies_go_on_after_the_connection_was_lost(
    page: Page, line: Line, puppet: Puppet
) -> None:
    await connect(page, line.url, firstPause=1)
    await ask(page, "One", "conversation-one")
    await ask(page, "Two", "conversation-two")
    one, two = (await puppet.reply()), (await puppet.reply(1))
    one.say("1a")
    two.say("2a")
    await says(page, "1a", 0)
    await says(page, "2a", 1)
    line.cut()
    one.say("1b")
    two.say("2b").end()
    line.mend()
    await says(page, "1a1b", 0)
    one.say("1c").end()
    assert [await end(page, 0), await end(page, 1)] == ["end_turn", "end_turn"]
    await says(page, "1a1b1c", 0)
    await says(page, "2a2b", 1)
    assert len(puppet.replies) == 2


async def test_a_stop_while_offline_holds(page: Page, line: Line, puppet: Puppet) -> None:
    await connect(page, line.url, firstPause=1)
    await ask(page, "Count")
    model = (await puppet.reply()).say("one")
    await says(page, "one")
    line.cut()
    await page.wait_for_function("chat.state !== 'open'")
    assert (await page.evaluate("replies[0].stop()"))["reason"] == "stopped"
    line.mend()
    async with asyncio.timeout(BOUND):
        await model.closed.wait()


async def test_it_comes_back_at_once_when_the_network_does(
    page: Page, line: Line, puppet: Puppet
) -> None:
    await connect(page, line.url, **NEVER)
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await says(page, "one ")
    await page.context.set_offline(True)
    line.cut()
    await state(page, "waiting")
    model.say("two").end()
    line.mend()
    await page.context.set_offline(False)
    assert await end(page) == "end_turn"
    await says(page, "one two")


async def test_it_comes_back_at_once_when_somebody_looks(page: Page, line: Line) -> None:
    await connect(page, line.url, **NEVER)
    await state(page, "open")
    line.cut()
    await state(page, "waiting")
    line.mend()
    await page.evaluate("""() => {
        for (const value of ['hidden', 'visible']) {
            Object.defineProperty(document, 'visibilityState', { value, configurable: true });
            document.dispatchEvent(new Event('visibilitychange'));
        }
    }""")
    await state(page, "open")


async def test_a_dead_connection_is_noticed_when_somebody_looks(page: Page, line: Line) -> None:
    await connect(page, line.url, heartbeat=10**9, **NEVER)
    await state(page, "open")
    line.deafen()
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await state(page, "waiting")


@asynccontextmanager
async def stage() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.stage",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def tell(process: asyncio.subprocess.Process, what: str, **keys: Any) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"n": 0, "do": what, **keys}).encode() + b"\n")
    async with asyncio.timeout(BOUND):
        return json.loads(await process.stdout.readline())["answer"]


async def test_a_server_that_was_killed_is_found_again_at_its_port(
    page: Page, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"store": f"sqlite:///{tmp_path / 'file'}", "save_interval": 0.01}
    async with stage() as doomed:
        port = (await tell(doomed, "serve", settings=settings))["port"]
        await connect(page, f"ws://127.0.0.1:{port}/", firstPause=10, longestPause=100)
        await ask(page, "say half; wait for ever")
        await says(page, "half")
        reply = await page.evaluate("replies[0].id")
        await tell(doomed, "saved", server=0, reply=reply, pieces=1)
        doomed.kill()
        await doomed.wait()
    await ask(page, "recall")  # while it is away
    async with stage() as heir:
        await tell(heir, "serve", settings={**settings, "port": port})
        assert await end(page) == "interrupted"
        assert await end(page, 1) == "end_turn"
        await says(page, "half", 0)
        await says(page, "say half; wait for ever | half", 1)


# The hook for React, in its example.


@pytest.fixture(scope="module")
def app() -> str:
    """The example as a script: ``start(properties)``, and ``pick(conversation)`` later.

    ``conversation`` is the one that the app is told to keep.
    """
    packages = require_npm_package("react-dom").parent
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
    built = subprocess.run(
        [
            require_npm_package("esbuild") / "bin/esbuild",
            "--bundle",
            "--loader=jsx",
            "--jsx=automatic",
            "--jsx-dev",
        ],
        input=entry,
        cwd=ROOT,
        env={**os.environ, "NODE_PATH": str(packages)},
        capture_output=True,
        timeout=BOUND,
        check=True,
        text=True,
    )
    return built.stdout


async def start(page: Page, app: str, **properties: str) -> None:
    await page.add_script_tag(content=app)
    await page.evaluate("properties => start(properties)", properties)
    await expect(page.get_by_role("status")).to_have_text("Connected")


async def type_in(page: Page, text: str) -> None:
    await page.get_by_label("Your message").fill(text)
    await page.get_by_label("Your message").press("Enter")


async def test_the_hook_shows_a_reply_as_it_comes_and_stops_it(
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
    await expect(messages).to_have_text(["Count", "one <b>two</b> (not whole: client)"])
    await expect(button).to_have_text("Send")
    async with asyncio.timeout(BOUND):
        await model.closed.wait()
    await type_in(page, "Again")
    (await puppet.reply(1)).say("whole").end()
    await expect(messages).to_have_text(
        ["Count", "one <b>two</b> (not whole: client)", "Again", "whole"]
    )
    await expect(button).to_have_text("Send")
    await type_in(page, "Fail")
    (await puppet.reply(2)).fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    await expect(page.get_by_role("alert")).to_contain_text("overloaded")
    await expect(button).to_have_text(["Send", "Retry"])


async def test_the_hook_goes_on_where_another_page_is(
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


A, B, UNKNOWN = "conversation-of-a", "conversation-of-b", "conversation-unknown"


async def pick(page: Page, conversation: str | None) -> None:
    await page.evaluate("id => pick(id ?? undefined)", conversation)


@pytest_asyncio.fixture(loop_scope="module")
async def two(page: Page, puppet: Puppet) -> None:
    """Two conversations, of one turn each."""
    await connect(page)
    for number, (prompt, conversation) in enumerate([("in A", A), ("in B", B)]):
        await ask(page, prompt, conversation)
        (await puppet.reply(number)).say(f"said {prompt}").end()
        await end(page, number)


@pytest.mark.usefixtures("two")
async def test_the_hook_clears_the_messages_where_another_conversation_is_picked(
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
async def test_the_hook_shows_no_reply_of_a_conversation_that_is_left_and_the_reply_goes_on(
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


async def test_the_hook_tells_the_conversation_that_a_reload_goes_on_with(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages = page.get_by_role("listitem")
    await type_in(page, "first")
    model = (await puppet.reply()).say("one ")
    await expect(messages).to_have_text(["first", "one"])
    conversation = await page.evaluate("conversation")
    await pick(page, conversation)  # as an app does that keeps it in its state
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


async def test_the_hook_asks_again_in_place_of_what_failed(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages, retry = page.get_by_role("listitem"), page.get_by_role("button", name="Retry")
    await type_in(page, "Hello")
    (await puppet.reply()).say("half").fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    await retry.click()
    (await puppet.reply(1)).fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    await expect(messages).to_have_text(["Hello", "(not whole: overloaded)"])
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


async def test_the_hook_asks_again_what_was_refused(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    messages, retry = page.get_by_role("listitem"), page.get_by_role("button", name="Retry")
    long = "x" * 40_000
    await type_in(page, long)
    await expect(messages).to_have_text([long, "(not whole: too_long)"])
    await retry.click()
    await expect(messages).to_have_text([long, "(not whole: too_long)"])
    await type_in(page, "short")
    (await puppet.reply()).say("whole").end()
    await expect(messages).to_have_text([long, "(not whole: too_long)", "short", "whole"])


async def test_the_hook_has_no_reply_under_way_where_the_server_closed_for_good(
    page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(page, app, url=server.url)
    await type_in(page, "Hello")
    (await puppet.reply()).say("half")
    await expect(page.get_by_role("listitem")).to_have_text(["Hello", "half"])
    for connection in tuple(server._connections):
        connection.end(1008, "enough")
    await expect(page.get_by_role("alert")).to_contain_text("closed")
    await expect(page.get_by_role("button")).to_have_text(["Send", "Retry"])
    await expect(page.get_by_role("status")).to_have_text("Not connected: closed")
