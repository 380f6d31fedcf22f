"""Export of a conversation to a file."""

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import (
    LONGEST_PAUSE,
    alert,
    converse,
    cut,
    state,
    stop_clock,
    visit,
)
from tests.support.client import client
from tests.support.puppet import Puppet
from wsserver.errors import StoreError
from wsserver.stores.memory import MemoryStore

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

CONVERSATION = "0123456789abcdef"
TO_MARKDOWN = (
    """(messages) => import('./export.js').then(({ toMarkdown }) => toMarkdown('T', messages))"""
)


async def choose(page: Page, name: str) -> None:
    await page.get_by_role("button", name="Export the conversation").click()
    await page.get_by_role("dialog").get_by_role("button", name=name).click()


async def export(page: Page, name: str, folder: Path) -> tuple[str, str]:
    """Export, and return the name of the file and its text."""
    async with page.expect_download() as waiting:
        await choose(page, name)
    download = await waiting.value
    await download.save_as(folder / "file")
    return download.suggested_filename, (folder / "file").read_text()


async def test_export_has_all_messages(blank: Page, puppet: Puppet, tmp_path: Path) -> None:
    page = blank
    async with wsserver.serve(puppet, port=0, drain_timeout=0, history_messages=4) as server:
        await visit(page, server)
        await expect(page.get_by_role("button", name="Export the conversation")).to_be_hidden()
        for number in range(5):
            await converse(page, puppet, f"Prompt {number}", f"Reply {number}")
        await page.reload()
        await expect(page.get_by_role("button", name="Show earlier messages")).to_be_visible()
        texts = dict([await export(page, name, tmp_path) for name in ("Markdown", "JSON")])
    said = [text for number in range(5) for text in (f"Prompt {number}", f"Reply {number}")]
    turns = [f"## {('You', 'Reply')[place % 2]}\n\n{text}" for place, text in enumerate(said)]
    whole, times = re.subn(r"\n\*.* [AP]M\*\n", "", texts["Prompt 0.md"])
    assert (whole, times) == ("\n\n".join(["# Prompt 0", *turns]) + "\n", 10)
    exported = json.loads(texts["Prompt 0.json"])
    assert all("began" in message for message in exported["messages"])
    assert [message["content"] for message in exported["messages"]] == said


@pytest.mark.parametrize("loaded", [0, 1])
async def test_failed_export_writes_no_file_and_can_be_repeated(
    blank: Page, puppet: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: int
) -> None:
    page = blank
    downloads: list[str] = []
    page.on("download", lambda download: downloads.append(download.url))
    async with wsserver.serve(puppet, port=0, drain_timeout=0, history_messages=4) as server:
        await visit(page, server)
        for number in range(5):
            await converse(page, puppet, f"Prompt {number}", f"Reply {number}")
        load: Callable[..., Awaitable[object]] = MemoryStore.load
        calls = 0

        async def broken(*given: Any, **keys: Any) -> object:
            nonlocal calls
            calls += 1
            if calls > loaded:
                raise StoreError("disk")
            return await load(*given, **keys)

        monkeypatch.setattr(MemoryStore, "load", broken)
        await choose(page, "Markdown")
        await expect(alert(page)).to_contain_text("There is no file")
        await expect(alert(page)).to_contain_text("The server cannot read or save conversations")
        assert calls == loaded + 1
        assert downloads == []
        monkeypatch.undo()
        async with page.expect_download() as waiting:
            await page.get_by_role("button", name="Try again").click()
        await (await waiting.value).save_as(tmp_path / "file")
        await expect(alert(page)).to_be_hidden()
    assert (tmp_path / "file").read_text().count("## Reply") == 5


async def test_export_without_connection_says_so_and_begins_after_reconnect(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First")
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await timed.clock.resume()
    await timed.context.set_offline(True)
    await choose(timed, "JSON")
    await expect(alert(timed)).to_have_text("The export begins when the connection is back.")
    async with timed.expect_download() as waiting:
        await timed.context.set_offline(False)
        await timed.clock.fast_forward(LONGEST_PAUSE)
    assert (await waiting.value).suggested_filename == "First.json"
    await expect(alert(timed)).to_be_hidden()


async def test_export_waits_for_limit_of_frames(
    blank: Page, puppet: Puppet, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"history_messages": 2, "frame_burst": 20, "frame_rate": 20}
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **settings) as server:
        for socket in range(6):
            async with client(server) as other:
                for number in range(socket * 10, socket * 10 + 10):
                    start = await other.prompt(f"Prompt {number}", conversation=CONVERSATION)
                    (await puppet.reply(number)).say("Reply").end()
                    await other.text(start["id"])
        await blank.goto(f"{server.page}#{CONVERSATION}")
        await expect(blank.locator("article")).to_have_count(2)
        _, text = await export(blank, "Markdown", tmp_path)
    assert [f"\nPrompt {number}\n" in text for number in range(60)] == [True] * 60


async def test_export_has_5000_turns(page: Page) -> None:
    """The page stays usable while it makes the text."""
    took, length = await page.evaluate("""async () => {
        const { toMarkdown } = await import('./export.js')
        const messages = Array.from({ length: 10_000 }, (_, place) => ({
            role: place % 2 ? 'assistant' : 'user', content: 'word '.repeat(place % 2 ? 200 : 20),
        }))
        const began = performance.now()
        const text = toMarkdown('T', messages)
        return [performance.now() - began, text.length]
    }""")
    assert length > 5_000 * 1_100
    assert took < 1_000


async def test_markdown_has_blocks_citations_and_words_for_partial_replies(page: Page) -> None:
    web = {"type": "web_search_result_location", "url": "https://a.example/", "title": "A [1]"}
    paper = {"type": "char_location", "document_title": "Paper", "cited_text": "x"}
    asked = [
        {"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
        {"type": "document", "title": "Minutes", "source": {"type": "text", "data": "x"}},
        {"type": "text", "text": "What is this?"},
    ]
    said = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "text", "text": "It is ", "citations": [web]},
        {"type": "text", "text": "small", "citations": [paper, web]},
        {"type": "text", "text": "."},
        {"type": "tool_use", "id": "t", "name": "weather", "input": {"place": "```"}},
    ]
    result = [{"type": "tool_result", "tool_use_id": "t", "content": "12 °C"}]
    formatted = """(times) => times.map((seconds) => new Intl.DateTimeFormat(
        undefined, { dateStyle: 'medium', timeStyle: 'short' }).format(seconds * 1000))"""
    began, ended = await page.evaluate(formatted, [1.5e9, 1.6e9])
    text = await page.evaluate(
        TO_MARKDOWN,
        [
            {"role": "user", "content": "What is this?", "blocks": asked, "began": 1.5e9},
            {
                "role": "assistant",
                "content": "It is small.",
                "blocks": said,
                "partial": "client",
                "began": 1.5e9,
                "ended": 1.6e9,
            },
            {"role": "user", "content": "", "blocks": result},
            {"role": "assistant", "content": "Co", "partial": "overloaded"},
        ],
    )
    assert (
        text
        == f"""\
# T

## You

*{began}*

![Image](<https://a.example/b.png>)

*Image*

*Document: Minutes*

What is this?

## Reply

*{ended}*

It is [^1]small[^2][^1].

*Tool call: weather*

````json
{{
  "place": "```"
}}
````

*Stopped.*

## You

*Tool result*

```json
"12 °C"
```

## Reply

Co

*The model is overloaded. Wait a little, and try again.*

[^1]: [A \\[1\\]](<https://a.example/>)

[^2]: Paper
"""
    )
