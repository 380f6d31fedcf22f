"""The examples of server-sent events in a real browser: a page, a React hook, an EventSource."""

import json
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import closed
from tests.browser.test_ten_lines import website
from tests.support.bundle import bundle
from tests.support.puppet import Puppet
from tests.support.tools import ROOT

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

EXAMPLES = ROOT / "examples/sse"


def address(server: wsserver.Server) -> str:
    return f"http://localhost:{server.port}"


async def test_page_streams_and_aborts_replies(
    blank: Page, server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    source = (EXAMPLES / "page.html").read_text()
    assert source.count("http://localhost:3001") == 1
    copy = source.replace("http://localhost:3001", address(server))
    (tmp_path / "page.html").write_text(copy)
    (tmp_path / "favicon.ico").touch()
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/page.html")
        output = blank.locator("pre")
        await blank.get_by_label("Prompt").fill("Count")
        await blank.get_by_role("button", name="Send").click()
        model = (await puppet.reply()).say("one ", "zwölf ")
        await expect(output).to_have_text("one zwölf")
        await blank.get_by_role("button", name="Stop").click()
        await closed(model.closed)
        await expect(output).to_have_text("one zwölf [AbortError]")
        await blank.get_by_role("button", name="Send").click()
        (await puppet.reply(1)).say("more").end()
        await expect(output).to_have_text("one zwölf [AbortError] more [end_turn]")


@pytest.fixture(scope="module")
def app() -> str:
    """An app of the hook, as a script: ``start(url)``."""
    entry = """
        import { createRoot } from 'react-dom/client'
        import { useChat } from './examples/sse/useChat.js'
        function App({ url }) {
          const { messages, streaming, send, stop } = useChat(url)
          return <>
            <ol>{messages.map((m, n) => <li key={n}>{m.role}: {m.content}</li>)}</ol>
            <button onClick={() => send('Count')}>Send</button>
            <button onClick={stop}>Stop</button>
            <p role="status">{streaming ? 'streaming' : 'idle'}</p>
          </>
        }
        globalThis.start = (url) =>
          createRoot(document.body.appendChild(document.createElement('div')))
            .render(<App url={url} />)
    """
    return bundle(entry)


async def test_hook_streams_stops_and_keeps_messages(
    bare_page: Page, server: wsserver.Server, puppet: Puppet, app: str, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><link rel=icon href=data:,>")
    with website(tmp_path) as port:
        await bare_page.goto(f"http://localhost:{port}/index.html")
        await bare_page.add_script_tag(content=app)
        await bare_page.evaluate("url => start(url)", f"{address(server)}/api/chat")
        items, status = bare_page.get_by_role("listitem"), bare_page.get_by_role("status")
        await bare_page.get_by_role("button", name="Send").click()
        model = (await puppet.reply()).say("one ")
        await expect(items).to_have_text(["user: Count", "assistant: one"])
        await expect(status).to_have_text("streaming")
        await bare_page.get_by_role("button", name="Stop").click()
        await closed(model.closed)
        await expect(status).to_have_text("idle")
        await bare_page.get_by_role("button", name="Send").click()
        second = await puppet.reply(1)
        assert [m.text for m in second.request.messages] == ["Count", "one ", "Count"]
        second.say("two").end()
        await expect(items.last).to_have_text("assistant: two")
        await expect(status).to_have_text("idle")


async def test_event_source_goes_on_after_cuts_and_stops_at_the_end(
    bare_page: Page, server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><link rel=icon href=data:,>")
    identifier = "0123456789abcdef0123"
    with website(tmp_path) as port:
        await bare_page.goto(f"http://localhost:{port}/index.html")
        body = json.dumps({"prompt": "Count", "id": identifier})
        await bare_page.evaluate(
            """async ([url, id, body]) => {
              const cut = new AbortController()
              const headers = { 'Content-Type': 'application/json' }
              await fetch(url, { method: 'POST', headers, body, signal: cut.signal })
              cut.abort()
              globalThis.said = ''
              globalThis.source = new EventSource(`${url}/${id}`)
              source.onmessage = ({ data }) => {
                const frame = JSON.parse(data)
                if (frame.type === 'token') said += frame.text
                document.title = frame.type
              }
            }""",
            [f"{address(server)}/api/chat", identifier, body],
        )
        model = await puppet.reply()
        words = [f"{number} " for number in range(20)]
        for word in words[:10]:
            model.say(word)
        await bare_page.wait_for_function("said.endsWith('9 ')")
        for connection in tuple(server.listener.connections):
            connection.abort()
        for word in words[10:]:
            model.say(word)
        model.end()
        await bare_page.wait_for_function("document.title === 'done'")
        assert await bare_page.evaluate("said") == "".join(words)
        await bare_page.wait_for_function("source.readyState === EventSource.CLOSED")
