"""Chats over server-sent events: origins, tokens, limits, slow readers, and the end of a server."""

import asyncio
import time
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.puppet import Puppet, until

ID = "0123456789abcdef0123"
ONE = {"messages": [{"role": "user", "content": "Hello?"}]}
PAGE = "https://app.example"


async def named(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
    """Know a client by its token, which is its name."""
    return None if token is None or token == "bad" else wsserver.Principal(token)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# Origins.


async def test_page_of_a_listed_origin_may_read_all_answers(puppet: Puppet) -> None:
    origin = {"origin": PAGE}
    async with wsserver.serve(puppet, port=0, origins=(PAGE,), drain_timeout=0) as server:
        async with Chat.open(server) as chat:
            preflight = {**origin, "access-control-request-method": "POST"}
            chat.send("OPTIONS", "/api/chat", headers=preflight)
            status, headers = await chat.browser.head()
            assert (status, headers["access-control-allow-origin"]) == (204, PAGE)
            assert "authorization" in headers["access-control-allow-headers"]
            assert "delete" in headers["access-control-allow-methods"]
        async with Chat.open(server) as chat:
            chat.send("POST", "/api/chat", ONE, headers=origin)
            status, headers = await chat.browser.head()
            assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
            assert headers["vary"] == "origin"
        async with Chat.open(server) as chat:
            chat.send("POST", "/api/chat", {}, headers=origin)
            status, headers = await chat.browser.head()
            assert (status, headers["access-control-allow-origin"]) == (400, PAGE)


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_page_of_another_origin_is_refused(
    server: wsserver.Server, puppet: Puppet, method: str
) -> None:
    async with Chat.open(server) as chat:
        chat.send(method, "/api/chat", ONE, headers={"origin": PAGE})
        status, headers = await chat.browser.head()
        assert (status, "access-control-allow-origin" in headers) == (403, False)
    assert not puppet.replies


# Tokens.


@pytest.mark.parametrize("headers", [{}, bearer("bad"), {"origin": "http://localhost"}])
async def test_client_without_a_valid_token_gets_401(
    puppet: Puppet, headers: dict[str, str]
) -> None:
    async with wsserver.serve(puppet, authenticate=named, port=0) as server:
        async with Chat.open(server) as chat:
            status, error = await chat.ask("POST", "/api/chat", ONE, headers=headers)
            assert (status, error["code"]) == (401, "unauthenticated")
    assert not puppet.replies


async def test_reply_of_another_principal_does_not_exist(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        async with Chat.open(server) as chat:
            await chat.prompt({**ONE, "id": ID}, headers=bearer("ada"))
            for method, suffix, told in (
                ("GET", "", (404, "not_found")),
                ("DELETE", "", (409, "not_running")),
                ("POST", "/stop", (409, "not_running")),
            ):
                async with Chat.open(server) as other:
                    target = f"/api/chat/{ID}{suffix}"
                    status, error = await other.ask(method, target, headers=bearer("bob"))
                    assert (status, error["code"]) == told
        assert server.app.hub.live == 1


async def test_reply_ends_with_the_login(puppet: Puppet) -> None:
    async def brief(_: str | None, __: wsserver.Handshake) -> wsserver.Principal:
        return wsserver.Principal("ada", expires=time.time() + 0.2)

    async with wsserver.serve(puppet, authenticate=brief, port=0) as server:
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
            reply = await puppet.reply()
            error = await chat.next("error")
            assert error["code"] == "unauthenticated"
            assert await chat.browser.chunk() == b""
            async with asyncio.timeout(5):
                await reply.closed.wait()


async def test_reload_ends_the_replies_of_revoked_tokens(puppet: Puppet) -> None:
    valid = {"ada", "bob"}

    async def listed(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
        return wsserver.Principal(token) if token in valid else None

    async with wsserver.serve(puppet, authenticate=listed, port=0, drain_timeout=0) as server:
        async with Chat.open(server) as ada, Chat.open(server) as bob:
            await ada.prompt(ONE, headers=bearer("ada"))
            await bob.prompt(ONE, headers=bearer("bob"))
            valid.remove("ada")
            await server.reload()
            assert (await ada.next("error"))["code"] == "unauthenticated"
            await (await puppet.reply(0)).closed.wait()
            (await puppet.reply(1)).say("Hello").end()
            assert (await bob.text())[0] == "Hello"


# Limits.


async def test_requests_over_the_rate_are_refused(puppet: Puppet) -> None:
    given: dict[str, Any] = {"frame_rate": 0.1, "frame_burst": 2}
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **given) as server:
        for status in (404, 404, 429):
            async with Chat.open(server) as chat:
                chat.send("GET", f"/api/chat/{ID}")
                got, headers = await chat.browser.head()
                assert (got, "retry-after" in headers) == (status, status == 429)


@pytest.mark.parametrize("path", ["/api/chat", "/agui"])
async def test_prompt_over_the_limit_does_not_read_its_chat_from_the_store(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    loaded: list[str] = []

    async with wsserver.serve(puppet, port=0, drain_timeout=0, prompts_per_minute=1) as server:
        load = server.app.store.load

        async def note(owner: str, name: str, **given: Any) -> Any:
            loaded.append(name)
            return await load(owner, name, **given)

        monkeypatch.setattr(server.app.store, "load", note)
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
        message = {"role": "user", "content": "x", "parts": [{"type": "text", "text": "x"}]}
        body = {"id": "chat", "threadId": "chat", "runId": "run", "messages": [message]}
        async with Chat.open(server) as chat:
            status, error = await chat.ask("POST", path, body)
            assert (status, error["code"]) == (429, "limit")
    assert not loaded


async def test_busy_conversation_refuses_a_second_prompt(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat, Chat.open(server) as other:
        await chat.prompt({"prompt": "one", "conversation": ID})
        status, error = await other.ask("POST", "/api/chat", {"prompt": "two", "conversation": ID})
        assert (status, error["code"], error["retryable"]) == (409, "busy", True)


async def test_slow_reader_gets_merged_events_and_all_text(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await chat.prompt(ONE)
        chat.browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
        reply = await puppet.reply()
        words = [f"{number:06} " * 20 for number in range(20_000)]
        reply.say(*words)
        reply.end()
        await until(reply.heard_out)
        chat.browser.writer.transport.resume_reading()  # type: ignore[attr-defined]
        text, done = await chat.text()
        assert done["type"] == "done"
        assert text == "".join(words)
        assert len(chat.frames) < len(words)


# The connection.


async def test_silence_is_broken_by_comments(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, ping_interval=0.05, drain_timeout=0) as server:
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
            for _ in range(3):
                assert await chat.browser.chunk() == b":\n\n"
            (await puppet.reply()).say("Hello").end()
            assert (await chat.text())[0] == "Hello"


async def test_client_of_http_1_0_reads_until_the_end(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        body = b'{"prompt": "Hello?"}'
        head = b"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        chat.browser.send(head, b"Content-Length: %d\r\n\r\n" % len(body), body)
        (await puppet.reply()).say("Hello").end()
        status, headers = await chat.browser.head()
        assert (status, "transfer-encoding" in headers) == (200, False)
        assert b'"text":"Hello"' in await chat.browser.reader.read()


async def test_head_tells_what_get_would_and_follows_nothing(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await chat.prompt({**ONE, "id": ID})
        async with Chat.open(server) as other:
            other.send("HEAD", f"/api/chat/{ID}")
            status, headers = await other.browser.head()
            assert (status, headers["content-type"]) == (200, "text/event-stream")
            assert await other.browser.ended()
        generation = server.app.hub.known("anonymous", ID)
        assert generation is not None
        assert generation.readers == 1


async def test_one_connection_serves_several_prompts(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        for number in range(3):
            await chat.prompt(ONE, headers={"connection": "keep-alive"})
            (await puppet.reply(number)).say(str(number)).end()
            assert (await chat.text())[0] == "012"[: number + 1]


async def test_server_that_closes_lets_replies_end(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=5) as server:
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
            closing = asyncio.create_task(server.close())
            await until(lambda: server.app.stopping)
            (await puppet.reply()).say("Hello").end()
            assert (await chat.text())[0] == "Hello"
        await closing


async def test_server_that_closes_stops_replies_after_the_drain_time(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0.05) as server:
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
            closing = asyncio.create_task(server.close())
            _, done = await chat.text()
            assert done["by"] == "shutdown"
        await closing
