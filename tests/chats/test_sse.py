"""Chats over server-sent events: a prompt, its reply, its stop, and going on after a cut."""

import asyncio
import json
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.client import client
from tests.support.puppet import Puppet, until
from wsserver.errors import StoreError

ID = "0123456789abcdef0123"
ONE = {"messages": [{"role": "user", "content": "Hello?"}]}


async def test_reply_is_streamed_as_events(server: wsserver.Server, puppet: Puppet) -> None:
    async with Chat.open(server) as chat:
        start = await chat.prompt(ONE)
        reply = await puppet.reply()
        assert reply.request.messages[-1].text == "Hello?"
        for word in ("Hel", "lo"):
            reply.say(word)
            assert (await chat.next())["text"] == word
        reply.end()
        text, done = await chat.text()
        assert (text, done["type"], done["id"]) == ("Hello", "done", start["id"])
        assert chat.last == f"{start['id']}.end"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Hello?"},
        {"prompt": [{"type": "text", "text": "Hello?"}]},
        {"prompt": "Hello?", "conversation": ID, "system": "Be brief.", "max_tokens": 5},
        {"type": "prompt", **ONE},
    ],
)
async def test_body_has_the_keys_of_a_prompt(
    server: wsserver.Server, puppet: Puppet, body: dict[str, Any]
) -> None:
    async with Chat.open(server) as chat:
        start = await chat.prompt({**body, "request": "one"})
        assert start["request"] == "one"
        assert start.get("conversation") == body.get("conversation", start.get("conversation"))
        (await puppet.reply()).say("Hello").end()
        assert (await chat.text())[0] == "Hello"


async def test_abort_stops_the_generation(server: wsserver.Server, puppet: Puppet) -> None:
    async with Chat.open(server) as chat:
        await chat.prompt(ONE)
        reply = await puppet.reply()
        reply.say("Hel")
        await chat.next("token")
        chat.browser.writer.close()
        async with asyncio.timeout(5):
            await reply.closed.wait()
    await until(lambda: not server.app.hub.live)


async def test_abort_before_the_head_stops_the_generation(puppet: Puppet) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow(_: str | None, __: wsserver.Handshake) -> wsserver.Principal:
        asked.set()
        await go.wait()
        return wsserver.Principal("ada")

    async with wsserver.serve(puppet, authenticate=slow, port=0, drain_timeout=0) as server:
        async with Chat.open(server) as chat:
            chat.send("POST", "/api/chat", ONE)
            await asked.wait()
        await until(lambda: not server.listener.connections)
        go.set()
        await until(lambda: not server.listener.answering)
        assert not server.app.hub.live
        assert all(reply.closed.is_set() for reply in puppet.replies)


async def test_reply_with_an_id_outlives_a_cut_and_goes_on_exactly(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await chat.prompt({**ONE, "id": ID})
        reply = await puppet.reply()
        reply.say("one ", "two ")
        await chat.next("token")
        first, last = chat.said, chat.last
    await until(lambda: not server.listener.connections)
    reply.say("three ")
    async with Chat.open(server) as again, Chat.open(server) as other:
        start = await again.resume(f"/api/chat/{ID}", headers={"last-event-id": last})
        assert start["after"] == int(last.partition(".")[2])
        await other.resume(f"/api/chat/{ID}?after=1")
        reply.say("four").end()
        text, done = await again.text()
        assert first + text == "one two three four"
        assert done["type"] == "done"
        assert (await other.text())[0] == "two three four"


async def test_event_source_that_has_all_is_told_not_to_connect_again(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await chat.prompt({**ONE, "id": ID})
        (await puppet.reply()).say("all").end()
        await chat.text()
    async with Chat.open(server) as again:
        again.send("GET", f"/api/chat/{ID}", headers={"last-event-id": chat.last})
        status, _ = await again.browser.head()
        assert status == 204


@pytest.mark.parametrize(("method", "suffix"), [("POST", "/stop"), ("DELETE", "")])
async def test_stop_is_answered_once_the_model_has_closed(
    server: wsserver.Server, puppet: Puppet, method: str, suffix: str
) -> None:
    async with Chat.open(server) as chat, Chat.open(server) as other:
        await chat.prompt({**ONE, "id": ID})
        reply = await puppet.reply()
        reply.hold = asyncio.Event()
        reply.say("half")
        await chat.next("token")
        asking = asyncio.create_task(other.ask(method, f"/api/chat/{ID}{suffix}"))
        await until(lambda: server.app.hub.known("anonymous", ID).why is not None)  # type: ignore[union-attr]
        assert not asking.done()
        reply.hold.set()
        assert await asking == (200, {"type": "stopped", "ids": [ID]})
        assert reply.closed.is_set()
        text, done = await chat.text()
        assert (text, done["by"]) == ("half", "client")
    async with Chat.open(server) as other:
        status, error = await other.ask(method, f"/api/chat/{ID}{suffix}")
        assert (status, error["code"]) == (409, "not_running")


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "code"),
    [
        ("POST", "/api/chat", b"{", 400, "invalid_json"),
        ("POST", "/api/chat", b"\xff", 400, "invalid_json"),
        ("POST", "/api/chat", {}, 400, "invalid_frame"),
        ("POST", "/api/chat", {"type": "stop"}, 400, "unknown_type"),
        ("POST", "/api/chat", {"prompt": "x" * 40_000}, 413, "too_long"),
        ("POST", "/api/chat", {"prompt": "x", "model": "other"}, 403, "model_not_allowed"),
        ("GET", f"/api/chat/{ID}", None, 404, "not_found"),
        ("GET", f"/api/chat/{ID}?after=x", None, 400, "invalid_frame"),
        ("DELETE", f"/api/chat/{ID}", None, 409, "not_running"),
        ("POST", f"/api/chat/{ID}/stop", None, 409, "not_running"),
        ("GET", "/api/chat/short", None, 404, "not_found"),
    ],
)
async def test_request_that_is_refused_gets_its_error_as_json(
    server: wsserver.Server,
    puppet: Puppet,
    method: str,
    target: str,
    body: object,
    status: int,
    code: str,
) -> None:
    async with Chat.open(server) as chat:
        got, error = await chat.ask(method, target, body)
        assert (got, error["type"], error["code"]) == (status, "error", code)
    assert not puppet.replies


async def test_client_of_a_socket_follows_a_reply_that_was_posted(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as socket, Chat.open(server) as chat:
        await chat.prompt({"prompt": "Hello?", "id": ID})
        reply = await puppet.reply()
        reply.say("Hel")
        await chat.next("token")
        await socket.send({"type": "resume", "id": ID, "after": 0})
        await socket.next("start")
        reply.say("lo").end()
        assert (await socket.text(ID))[0] == "Hello"
        assert (await chat.text())[0] == "Hello"


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("PUT", "/api/chat", "post, options"),
        ("POST", f"/api/chat/{ID}", "get, head, delete, options"),
        ("GET", f"/api/chat/{ID}/stop", "post, options"),
        ("GET", "/agui", "post, options"),
    ],
)
async def test_other_methods_are_not_allowed(
    server: wsserver.Server, method: str, target: str, allowed: str
) -> None:
    async with Chat.open(server) as chat:
        chat.send(method, target)
        status, headers = await chat.browser.head()
        error = json.loads(await chat.browser.reader.readexactly(int(headers["content-length"])))
        assert (status, headers["allow"], error["type"]) == (405, allowed, "error")


async def test_place_beyond_the_reply_or_of_another_is_refused(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await chat.prompt({**ONE, "id": ID})
        async with Chat.open(server) as other:
            status, error = await other.ask("GET", f"/api/chat/{ID}?after=5")
            assert (status, error["code"]) == (409, "gap")
        async with Chat.open(server) as other:
            elsewhere = {"last-event-id": "another-generation.3"}
            status, error = await other.ask("GET", f"/api/chat/{ID}", headers=elsewhere)
            assert (status, error["code"]) == (400, "invalid_frame")


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "application/x-www-form-urlencoded"}, {"content-encoding": "gzip"}],
)
async def test_body_of_another_type_is_refused(
    server: wsserver.Server, puppet: Puppet, headers: dict[str, str]
) -> None:
    async with Chat.open(server) as chat:
        status, error = await chat.ask("POST", "/api/chat", {"prompt": "x"}, headers=headers)
        assert (status, error["code"]) == (415, "invalid_frame")
    assert not puppet.replies


async def test_store_that_fails_is_503(
    server: wsserver.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(server.app.store, "find", fail)
    async with Chat.open(server) as chat:
        status, error = await chat.ask("GET", f"/api/chat/{ID}")
        assert (status, error["code"], error["retryable"]) == (503, "store", True)
        assert "disk" not in error["message"]


async def test_cursor_that_fails_aborts_the_response(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise LookupError("a fault")

    async with Chat.open(server) as chat:
        await chat.prompt(ONE)
        monkeypatch.setattr("wsserver.dialects.sse.SSE.run", fail)
        reply = (await puppet.reply()).say("Hello")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await chat.next("token")
        await reply.closed.wait()
