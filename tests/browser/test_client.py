"""The JavaScript client in a real browser."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.client import ask, connect, end, says, state
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet, Thinking
from tests.support.tools import ROOT

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


@pytest.fixture
def page(bare_page: Page) -> Page:
    return bare_page


NEVER = {"firstPause": 10**9, "longestPause": 10**9}  # reconnects only at an event


async def test_stop_ends_reply(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await page.goto(server.page)  # the content security policy must allow it
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


async def test_readme_lines_run(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    section = (ROOT / "examples/clients.md").read_text().partition("\n## In a browser\n")[2]
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


async def test_two_replies_continue_after_lost_connection(
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


async def test_stop_while_offline_is_sent_on_reconnect(
    page: Page, line: Line, puppet: Puppet
) -> None:
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


async def test_client_reconnects_at_once_when_network_is_back(
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


async def test_client_reconnects_at_once_when_page_becomes_visible(page: Page, line: Line) -> None:
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


async def test_dead_connection_is_noticed_when_page_becomes_visible(page: Page, line: Line) -> None:
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


async def test_client_reconnects_to_restarted_server(page: Page, tmp_path: Path) -> None:
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
    await ask(page, "recall")  # while the page is hidden
    async with stage() as heir:
        await tell(heir, "serve", settings={**settings, "port": port})
        assert await end(page) == "interrupted"
        assert await end(page, 1) == "end_turn"
        await says(page, "half", 0)
        await says(page, "say half; wait for ever | half", 1)
