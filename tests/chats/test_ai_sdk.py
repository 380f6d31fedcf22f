"""The AI SDK's messages and chats, as far as no browser is needed."""

import asyncio
import itertools
import json
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet
from wsserver.content import ToolUse

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


async def test_page_that_does_not_come_back_stops_its_reply(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.chats.RELOAD", 0.05)
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", body(text("user", "Hello?")))
        reply = await puppet.reply()
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()


@pytest.mark.parametrize(
    "messages",
    [
        [{"id": "1", "role": "user", "parts": "x"}],
        [text("user", "x"), "y"],
        [text("user", "x"), text("assistant", "y")],
        [text("user", " ")],
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
