"""Drain and close of an embedded server. The tests of the command line test signals."""

import asyncio
import socket
from contextlib import AsyncExitStack

import pytest

import wsserver
from tests.support.abuse import Peer
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from tests.test_leak import Here
from tests.test_slow_reader import sluggard, stuck


async def bounded(closing: "asyncio.Task[None]") -> None:
    async with asyncio.timeout(BOUND):
        await closing


async def code(chat: Client) -> int | None:
    closed = await chat.closed()
    return closed.rcvd.code if closed.rcvd is not None else None


async def test_running_replies_finish_before_close_1012(
    puppet: Puppet,
) -> None:
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        start = await chat.prompt("Let me finish")
        reply = (await puppet.reply()).say("begun, ")
        await chat.next("token")
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0)
        reply.say("done").end()
        text, done = await chat.text(start["id"])
        assert (text, done["reason"]) == ("begun, done", "end_turn")
        assert await code(chat) == 1012
        await bounded(closing)


async def test_drain_refuses_prompts_and_connections(
    puppet: Puppet,
) -> None:
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        port = server.port
        await chat.prompt("A")
        queued = await chat.prompt("B", on_busy="queue")
        closing = asyncio.create_task(server.close())
        done = await chat.next("done", id=queued["id"])
        assert done["by"] == "shutdown"
        refused = await chat.prompt("C", conversation="conversation-one")
        assert (refused["code"], refused["retryable"]) == ("shutting_down", True)
        with pytest.raises(OSError, match=r"refused|failed"):
            await asyncio.open_connection("127.0.0.1", port)
        (await puppet.reply()).end()
        await bounded(closing)


async def test_replies_over_drain_timeout_are_stopped(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, drain_timeout=0.05) as server,
        client(server) as chat,
    ):
        start = await chat.prompt()
        reply = (await puppet.reply()).say("half")
        closing = asyncio.create_task(server.close())
        text, done = await chat.text(start["id"])
        assert (text, done["by"]) == ("half", "shutdown")
        assert reply.closed.is_set()
        assert await code(chat) == 1012
        await bounded(closing)


async def test_close_does_not_wait_for_client_not_reading(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, drain_timeout=0, shutdown_timeout=0.2, send_timeout=1000
    ) as server:
        async with sluggard(server) as slow:
            await stuck(server, puppet, slow)
            await bounded(asyncio.create_task(server.close()))
            assert not server.listener.connections


async def test_close_does_not_wait_for_handshake(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, open_timeout=1000, shutdown_timeout=0.2, drain_timeout=0
    ) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"GET / HT")
            await until(lambda: server.listener.connections)
            await bounded(asyncio.create_task(server.close()))


async def test_hurry_ends_drain_at_once(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=1000, shutdown_timeout=1000) as server:
        async with client(server) as chat:
            await chat.prompt()
            reply = await puppet.reply()
            closing = asyncio.create_task(server.close())
            await chat.quiet()
            server.hurry()
            await bounded(closing)
            assert reply.closed.is_set()
            await chat.closed()


async def test_close_does_not_wait_for_hanging_model(puppet: Puppet) -> None:
    for hurried in (False, True):
        async with wsserver.serve(
            puppet, port=0, drain_timeout=0, shutdown_timeout=0.1, stop_timeout=1000
        ) as server:
            async with client(server) as chat:
                await chat.prompt()
                reply = await puppet.reply(int(hurried))
                reply.hold = asyncio.Event()
                if hurried:
                    server.hurry()
                await bounded(asyncio.create_task(server.close()))
                reply.hold.set()
                await until(reply.closed.is_set)
                await chat.closed()


async def test_second_close_waits_for_first(server: wsserver.Server) -> None:
    await asyncio.gather(server.close(), server.close())
    await server.close()
    await server.serve_forever()


async def test_serve_forever_returns_after_failed_close(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise LookupError("a store of one's own")

    server = wsserver.serve(puppet, port=0)
    with pytest.raises(LookupError):
        async with server:
            monkeypatch.setattr(server.app.store, "close", broken)
    async with asyncio.timeout(BOUND):
        await server.serve_forever()


async def test_hundreds_of_sockets_close_with_1012(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0) as server, AsyncExitStack() as stack:
        chats = [await stack.enter_async_context(client(server)) for _ in range(150)]
        closing = asyncio.create_task(server.close())
        assert [await code(chat) for chat in chats] == [1012] * 150
        await bounded(closing)


async def test_exception_in_with_block_closes_at_once(puppet: Puppet) -> None:
    with pytest.raises(ZeroDivisionError):
        async with wsserver.serve(puppet, port=0, drain_timeout=1000, shutdown_timeout=1000) as s:
            async with client(s) as chat:
                await chat.prompt()
                await puppet.reply()
                raise ZeroDivisionError


async def test_server_closes_own_model_but_not_given_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []

    class Closable(Puppet):
        async def aclose(self) -> None:
            closed.append(self)

    given = Closable()
    async with wsserver.serve(given, port=0):
        pass
    assert closed == [], "what it was given is not its own"
    monkeypatch.setattr("wsserver.models.make", lambda settings: given)
    async with wsserver.serve(port=0):
        pass
    assert closed == [given]


async def test_failing_or_hanging_model_close_does_not_block_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fails(Puppet):
        async def aclose(self) -> None:
            raise ConnectionError

    class Hangs(Puppet):
        async def aclose(self) -> None:
            await asyncio.Event().wait()

    for model in (Fails(), Hangs(), Hangs):
        monkeypatch.setattr("wsserver.models.make", lambda settings, model=model: model)
        async with wsserver.serve(port=0, stop_timeout=0.05) as server:
            await bounded(asyncio.create_task(server.close()))


async def test_server_cannot_be_entered_twice(puppet: Puppet) -> None:
    server = wsserver.serve(puppet, port=0)
    server.hurry()
    await server.close()  # nothing to close yet
    async with server:
        with pytest.raises(RuntimeError):
            await server.__aenter__()


async def test_model_is_given_by_name_and_invalid_model_is_refused() -> None:
    async with wsserver.serve("demo", port=0) as server:
        assert server.model_name == "demo"
    with pytest.raises(wsserver.ConfigError, match="not callable"):
        wsserver.serve(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        wsserver.serve(settings=wsserver.Settings(), port=5)


async def test_failed_bind_closes_own_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = asyncio.Event()

    class Closable(Puppet):
        async def aclose(self) -> None:
            closed.set()

    monkeypatch.setattr("wsserver.models.make", lambda settings: Closable())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        async with wsserver.serve(port=taken.getsockname()[1]):
            raise AssertionError
    assert closed.is_set()


async def test_close_leaves_no_task_or_connection(puppet: Puppet) -> None:
    before = asyncio.all_tasks()
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.prompt()
            await puppet.reply()
    assert asyncio.all_tasks() == before
    assert not server.listener.connections
    assert not server.app.connections


async def test_handshake_answered_during_drain_gets_503(puppet: Puppet) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(token: str | None, _: wsserver.Handshake) -> wsserver.Principal:
        if token is None:
            asked.set()
            await answer.wait()
        return wsserver.Principal("ada")

    bearer = {"Authorization": "Bearer x"}
    async with (
        wsserver.serve(puppet, authenticate=slow, port=0, open_timeout=30) as server,
        client(server, additional_headers=bearer) as chat,
        Peer.open(Here(server), "127.0.0.1") as late,
    ):
        await chat.prompt()
        upgrade = asyncio.create_task(late.upgrade())
        await asyncio.wait_for(asked.wait(), BOUND)
        closing = asyncio.create_task(server.close())
        await chat.quiet()
        answer.set()
        assert (await upgrade).startswith(b"HTTP/1.1 503 ")
        assert await late.rest() == b"The server is shutting down.\n"
        (await puppet.reply()).end()
        await bounded(closing)


async def test_close_does_not_wait_for_authenticator(puppet: Puppet) -> None:
    asked, given_up = asyncio.Event(), asyncio.Event()

    async def never(token: str | None, _: wsserver.Handshake) -> None:
        try:
            asked.set()
            await asyncio.Event().wait()
        finally:
            given_up.set()

    async with (
        wsserver.serve(puppet, authenticate=never, port=0, open_timeout=1000) as server,
        Peer.open(Here(server), "127.0.0.1") as late,
    ):
        late.write(Peer.HANDSHAKE + b"\r\n")
        await asyncio.wait_for(asked.wait(), BOUND)
        await bounded(asyncio.create_task(server.close()))
        assert given_up.is_set()
        assert await late.rest() == b""
