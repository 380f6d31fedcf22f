"""The AI SDK's messages and chats, as far as no browser is needed."""

import asyncio
import itertools
import json
import urllib.parse
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet
from tests.support.tools import ROOT, require_node, require_npm_package
from wsserver.content import Text, ToolUse, dump_block
from wsserver.models.base import Output
from wsserver.pieces import Piece

CHAT = "a chat, whose id is no id of ours"


def text(role: str, said: str) -> dict[str, Any]:
    return {"id": said, "role": role, "parts": [{"type": "text", "text": said}]}


def body(*messages: dict[str, Any], **keys: object) -> dict[str, Any]:
    return {"id": CHAT, "trigger": "submit-message", "messages": list(messages), **keys}


async def parts_of(chat: Chat) -> list[dict[str, Any]]:
    """Return all parts of a stream, whose last line is ``[DONE]``."""
    status, headers = await chat.browser.head()
    assert (status, headers["x-vercel-ai-ui-message-stream"]) == (200, "v1")
    events = (await chat.browser.chunks()).decode().split("\n\n")
    *lines, done, rest = [event for event in events if not event.startswith(":")]
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_parts_come_in_order(server: wsserver.Server, puppet: Puppet) -> None:
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Hello?")))
        tool = ToolUse("tool-1", "look", {})
        (await puppet.reply()).say(Thinking("hm"), "Hel", "lo", tool, "!").end()
        parts = await parts_of(chat)
    types = [name for name, _ in itertools.groupby(part["type"] for part in parts)]
    text_part = ["text-start", "text-delta", "text-end"]
    reasoning = ["reasoning-start", "reasoning-delta", "reasoning-end"]
    assert types == [
        *("start", "start-step"),
        *(*reasoning, *text_part, *text_part),
        *("finish-step", "finish"),
    ]
    deltas = [part["delta"] for part in parts if part["type"] == "text-delta"]
    assert "".join(deltas) == "Hello!"
    assert parts[-1]["finishReason"] == "stop"


async def test_error_of_the_model_is_the_last_part(server: wsserver.Server, puppet: Puppet) -> None:
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Hello?")))
        (await puppet.reply()).say("half").fail(wsserver.ModelError("overloaded"))
        parts = await parts_of(chat)
    assert [part["type"] for part in parts[-3:]] == ["text-end", "message-metadata", "error"]
    assert parts[-2]["messageMetadata"]["code"] == "overloaded"


async def test_files_and_system_messages_reach_the_model(
    server: wsserver.Server, puppet: Puppet
) -> None:
    image = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,aGk="}
    paper = {"type": "file", "mediaType": "application/pdf", "url": "https://example.com/a.pdf"}
    nothing: list[object] = [{"type": "step-start"}, {"type": "text", "text": " "}, "x"]
    question = {
        "id": "1",
        "role": "user",
        "parts": [{"type": "text", "text": "What?"}, image, paper, *nothing],
    }
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("system", "Be brief."), question))
        (await puppet.reply()).say("A dot.").end()
        await parts_of(chat)
    request = puppet.replies[0].request
    assert request.system == "Be brief."
    assert [block.type for block in request.messages[-1].blocks] == ["text", "image", "document"]


async def test_chat_that_the_server_does_not_know_is_answered_as_it_is(
    server: wsserver.Server, puppet: Puppet
) -> None:
    history = [text("user", "one"), text("assistant", "two"), text("user", "three")]
    async with Chat.open(server) as chat, Chat.open(server) as again, Chat.open(server) as other:
        chat.send("POST", "/api/chat", body(*history))
        reply = await puppet.reply()
        assert [m.text for m in reply.request.messages] == ["one", "two", "three"]
        reply.say("half")
        target = f"/api/chat/{CHAT.replace(' ', '%20').replace(',', '%2C')}"
        again.send("GET", f"{target}/stream")
        reply.say("whole").end()
        deltas = [part["delta"] for part in await parts_of(again) if "delta" in part]
        assert "".join(deltas) == "halfwhole"
        await parts_of(chat)
        other.send("GET", f"{target}/stream")
        assert (await other.browser.head())[0] == 204


async def test_chat_is_stopped_by_its_id(server: wsserver.Server, puppet: Puppet) -> None:
    name = "chat-0123456789abcdef"
    async with Chat.open(server) as chat, Chat.open(server) as other:
        chat.send("POST", "/api/chat", body(text("user", "Hello?"), id=name))
        reply = await puppet.reply()
        status, stopped = await other.ask("POST", f"/api/chat/{name}/stop")
        assert (status, len(stopped["ids"])) == (200, 1)
        assert reply.closed.is_set()
        finish = (await parts_of(chat))[-1]
        assert finish["finishReason"] == "other"
        assert finish["messageMetadata"]["by"] == "client"


async def resume(server: wsserver.Server) -> int:
    """Ask for the running reply, as a page that resumes does at first."""
    async with Chat.open(server) as chat:
        chat.send("GET", f"/api/chat/{urllib.parse.quote(CHAT)}/stream")
        return (await chat.browser.head())[0]


async def test_answer_that_nothing_runs_is_not_stored_by_caches(server: wsserver.Server) -> None:
    async with Chat.open(server) as chat:
        chat.send("GET", "/api/chat/no-chat/stream")
        status, headers = await chat.browser.head()
        assert (status, headers["cache-control"]) == (204, "no-store")


async def test_page_that_does_not_come_back_stops_its_reply(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.chats.chats.RELOAD", 0.05)
    assert await resume(server) == 204
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Hello?")))
        reply = await puppet.reply()
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()


async def test_page_that_comes_back_has_its_reply(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.chats.chats.RELOAD", 2 * BOUND)
    await resume(server)
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Hello?")))
        reply = await puppet.reply()
    assert await resume(server) == 200
    assert not reply.closed.is_set()


async def test_page_not_known_to_resume_stops_its_reply_at_once(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.chats.chats.RELOAD", 2 * BOUND)
    monkeypatch.setattr("wsserver.hub.hub.RESUMING", 1)
    await resume(server)
    async with Chat.open(server) as chat:
        chat.send("GET", "/api/chat/another/stream")
        await chat.browser.head()
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Hello?")))
        reply = await puppet.reply()
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()


async def say(
    server: wsserver.Server, puppet: Puppet, said: str, *messages: dict[str, Any], **keys: object
) -> tuple[list[str], dict[str, Any]]:
    """Make a request that the model answers. Return what the model got, and the message."""
    number = len(puppet.replies)
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(*messages, **keys))
        reply = await puppet.reply(number)
        reply.say(said).end()
        parts = await parts_of(chat)
    message = {**text("assistant", said), "id": parts[0]["messageId"]}
    return [message.text for message in reply.request.messages], message


async def test_edit_of_the_last_prompt_replaces_the_last_turn(
    server: wsserver.Server, puppet: Puppet
) -> None:
    first, second = text("user", "1"), text("user", "2")
    _, one = await say(server, puppet, "one", first)
    await say(server, puppet, "two", first, one, second)
    edited = text("user", "two?")
    got, two = await say(server, puppet, "zwei", first, one, edited, messageId=second["id"])
    assert got == ["1", "one", "two?"]
    got, _ = await say(server, puppet, "three", first, one, edited, two, text("user", "3"))
    assert got == ["1", "one", "two?", "zwei", "3"]


async def test_edit_of_an_older_prompt_is_answered_with_the_messages_of_the_client(
    server: wsserver.Server, puppet: Puppet
) -> None:
    first, second = text("user", "1"), text("user", "2")
    _, one = await say(server, puppet, "one", first)
    _, two = await say(server, puppet, "two", first, one, second)
    await say(server, puppet, "three", first, one, second, two, text("user", "3"))
    edited = text("user", "2!")
    got, again = await say(server, puppet, "zwei", first, one, edited, messageId=second["id"])
    assert got == ["1", "one", "2!"]
    got, _ = await say(server, puppet, "drei", first, one, edited, again, text("user", "3!"))
    assert got == ["1", "one", "2!", "zwei", "3!"]
    got, _ = await say(server, puppet, "four", first, one, second, two, text("user", "4"))
    assert got == ["1", "one", "2", "two", "3", "three", "4"], "a tab that misses a turn"


async def test_prompt_after_a_refused_first_one_begins_the_conversation(
    server: wsserver.Server, puppet: Puppet
) -> None:
    refused, first = text("user", "refused"), text("user", "1")
    got, one = await say(server, puppet, "one", refused, first)
    assert got == ["1"]
    got, _ = await say(server, puppet, "two", refused, first, one, text("user", "2"))
    assert got == ["1", "one", "2"]


async def test_app_may_send_only_the_newest_message(
    server: wsserver.Server, puppet: Puppet
) -> None:
    for number, (prompt, keys, expected) in enumerate(
        [
            ("1", {}, ["1"]),
            ("2", {}, ["1", "said 0", "2"]),
            ("2", {"trigger": "regenerate-message"}, ["1", "said 0", "2"]),
            ("3", {}, ["1", "said 0", "2", "said 2", "3"]),
        ]
    ):
        async with Chat.open(server) as chat:
            chat.send("POST", "/api/chat", {"id": CHAT, "message": text("user", prompt), **keys})
            reply = await puppet.reply(number)
            assert [message.text for message in reply.request.messages] == expected
            reply.say(f"said {number}").end()
            await parts_of(chat)


async def test_parts_of_other_servers_do_not_reach_the_model(
    server: wsserver.Server, puppet: Puppet
) -> None:
    call = {"toolCallId": "1", "input": {}, "state": "output-available", "output": "sunny"}
    tools = {"id": "t", "role": "assistant", "parts": [{"type": "tool-weather", **call}]}
    answer = {
        "id": "a",
        "role": "assistant",
        "parts": [
            {"type": "step-start"},
            {"type": "reasoning", "text": "hm"},
            {"type": "dynamic-tool", "toolName": "weather", **call},
            {"type": "source-url", "sourceId": "1", "url": "https://example.com"},
            {"type": "data-chart", "data": [1]},
            {"type": "text", "text": "It is sunny.", "state": "done"},
        ],
    }
    history = [text("user", "Weather?"), tools, answer, text("user", "And tomorrow?")]
    got, _ = await say(server, puppet, "Rain.", *history)
    assert got == ["Weather?", "It is sunny.", "And tomorrow?"]


async def test_text_file_is_a_document_of_text(server: wsserver.Server, puppet: Puppet) -> None:
    url = "data:text/markdown;base64,IyBIacO2"
    file = {"type": "file", "mediaType": "text/markdown", "filename": "a.md", "url": url}
    question = {"id": "1", "role": "user", "parts": [file]}
    await say(server, puppet, "A title.", question)
    (document,) = puppet.replies[0].request.messages[-1].blocks
    assert dump_block(document) == {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "# Hiö"},
        "title": "a.md",
    }


PAGE = {"type": "web_search_result_location", "url": "https://example.com/a", "title": "A"}
PAPER = {"type": "page_location", "document_index": 0, "document_title": None}


async def test_citations_are_sources_once_each(server: wsserver.Server, puppet: Puppet) -> None:
    cited = Text("It rains.", {"citations": [PAGE, PAPER, {**PAGE, "cited_text": "rain"}]})
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Weather?")))
        (await puppet.reply()).say(cited).end()
        sources = [part for part in await parts_of(chat) if part["type"].startswith("source")]
    paper = {"sourceId": "document-0", "mediaType": "application/pdf", "title": "Document 1"}
    assert sources == [
        {"type": "source-url", "sourceId": PAGE["url"], "url": PAGE["url"], "title": "A"},
        {"type": "source-document", **paper},
    ]


@pytest.mark.parametrize(
    ("citation", "title"),
    [
        ({"title": "\ud83d"}, "\ufffd"),
        ({"title": 5, "document_index": "one"}, "Document 1"),
        ({"url": 5, "document_index": None, "document_title": ["A"]}, "Document 1"),
    ],
)
async def test_citation_of_any_shape_is_a_source(
    server: wsserver.Server, puppet: Puppet, citation: object, title: str
) -> None:
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Weather?")))
        cited = Piece("citation", 0, json.dumps(citation))
        (await puppet.reply()).say(Piece("text", 0, "Rain"), cited).end()
        parts = await parts_of(chat)
    (source,) = [part for part in parts if part["type"].startswith("source")]
    assert (source["sourceId"], source["title"]) == ("document-0", title)
    assert parts[-1]["type"] == "finish"


@pytest.mark.slow
async def test_all_parts_fit_the_schema_of_the_sdk(server: wsserver.Server, puppet: Puppet) -> None:
    cited = Text("It rains.", {"citations": [PAGE, PAPER]})
    said: list[Output] = [Thinking("hm"), cited, ToolUse("tool-1", "look", {}), "Bye."]
    parts = []
    for number, end in enumerate([None, wsserver.ModelError("overloaded")]):
        async with Chat.open(server) as chat:
            chat.send("POST", "/api/chat", body(text("user", "Weather?")))
            reply = (await puppet.reply(number)).say(*said)
            reply.end() if end is None else reply.fail(end)
            parts += await parts_of(chat)
    assert len({part["type"] for part in parts}) == 14
    lines = "".join(json.dumps(part) + "\n" for part in parts)
    require_npm_package("ai")
    checker = await asyncio.create_subprocess_exec(
        require_node(),
        str(ROOT / "tests/js/ai_sdk_parts.mjs"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await checker.communicate(lines.encode())
    complaints, messages = map(json.loads, printed.splitlines())
    assert complaints == []
    kinds = ["step-start", "reasoning", "text", "source-url", "source-document", "text"]
    assert [[part["type"] for part in message["parts"]] for message in messages] == [kinds, kinds]


@pytest.mark.parametrize(
    "messages",
    [
        [{"id": "1", "role": "user", "parts": "x"}],
        [text("user", "x"), "y"],
        [text("user", "x"), text("assistant", "y")],
        [text("user", " ")],
        [{"role": "user", "parts": [{"type": "file", "url": "data:text/plain;base64,x"}]}],
        [text("robot", "x")],
    ],
)
async def test_unusable_messages_are_refused(
    server: wsserver.Server, puppet: Puppet, messages: list[Any]
) -> None:
    async with Chat.open(server) as chat:
        status, error = await chat.ask("POST", "/api/chat", body(*messages))
        assert (status, error["code"]) == (400, "invalid_frame")
    assert not puppet.replies


@pytest.mark.parametrize("name", ["", None, 5])
async def test_chat_without_an_id_is_refused(
    server: wsserver.Server, puppet: Puppet, name: object
) -> None:
    async with Chat.open(server) as chat:
        status, error = await chat.ask("POST", "/api/chat", body(text("user", "Hello?"), id=name))
        assert (status, error["code"]) == (400, "invalid_frame")
    assert not puppet.replies
