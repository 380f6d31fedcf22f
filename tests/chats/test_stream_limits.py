"""What one client can make the server spend on streams is bounded, by the limits of its account."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.client import client
from tests.support.puppet import Puppet, until
from tests.test_telemetry import value
from wsserver.limits import account_of

ID = "0123456789abcdef0123"
MEBIBYTE = 2**20


async def named(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
    """Know a client by its token, which is its name."""
    return None if token is None else wsserver.Principal(token)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def serve(puppet: Puppet, **given: Any) -> wsserver.Server:
    return wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0, **given)


async def finish(server: wsserver.Server, puppet: Puppet, text: str) -> None:
    """Have the model write a whole reply to ada."""
    async with Chat.open(server) as chat:
        await chat.prompt({"prompt": "Hello?", "id": ID}, headers=bearer("ada"))
        (await puppet.reply()).say(text).end()
        assert (await chat.text())[0] == text
    await until(lambda: not server.listener.connections)


async def test_streams_and_sockets_of_a_principal_share_its_connections(puppet: Puppet) -> None:
    async with serve(puppet, connections_per_principal=3) as server, AsyncExitStack() as stack:
        ada = {"additional_headers": bearer("ada")}
        await (await stack.enter_async_context(client(server, **ada))).quiet()
        streams = [await stack.enter_async_context(Chat.open(server)) for _ in range(3)]
        for number, chat in enumerate(streams[:2]):
            await chat.prompt({"prompt": str(number)}, headers=bearer("ada"))
        status, error = await streams[2].ask(
            "POST", "/api/chat", {"prompt": "one too many"}, headers=bearer("ada")
        )
        assert (status, error["code"]) == (429, "limit")
        async with Chat.open(server) as other:
            await other.prompt({"prompt": "of bob"}, headers=bearer("bob"))
        streams[0].browser.writer.close()
        await until(lambda: value(server, "streams_open") == 1)
        async with Chat.open(server) as again:
            await again.prompt({"prompt": "as before"}, headers=bearer("ada"))


async def test_thousand_requests_for_a_finished_reply_cost_its_principal(puppet: Puppet) -> None:
    async with serve(puppet, frame_rate=0.001, frame_burst=50) as server:
        await finish(server, puppet, "Hello")
        statuses: dict[int, int] = {}

        async def ask() -> None:
            async with Chat.open(server) as chat:
                chat.send("GET", f"/api/chat/{ID}", headers=bearer("ada"))
                status, _ = await chat.browser.head()
                statuses[status] = statuses.get(status, 0) + 1

        for _ in range(50):
            await asyncio.gather(*(ask() for _ in range(20)))
        assert statuses == {200: 49, 429: 951}
        await until(lambda: not server.listener.connections)
        generation = server.app.hub.known("ada", ID)
        assert generation is not None
        assert generation.readers == 0
        assert server.memory.used == server.memory.cached
        async with Chat.open(server) as chat:
            await chat.prompt({"prompt": "of bob"}, headers=bearer("bob"))


async def test_readers_that_never_read_hold_bounded_memory_of_their_principal(
    puppet: Puppet,
) -> None:
    size = {"frame_size": 2**14, "write_buffer": 2**15}
    async with serve(puppet, send_timeout=0.5, replay_size=8 * MEBIBYTE, **size) as server:
        await finish(server, puppet, "x" * (3 * MEBIBYTE))
        async with AsyncExitStack() as stack:
            for _ in range(20):
                chat = await stack.enter_async_context(Chat.open(server))
                chat.browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
                chat.send("GET", f"/api/chat/{ID}", headers=bearer("ada"))
            account = account_of("ada")
            held = 0

            def all_aborted() -> bool:
                nonlocal held
                held = max(held, server.memory.used_by(account))
                return value(server, "readers_aborted_total", "does not read") == 20

            await until(all_aborted)
            assert 20 * 2**15 <= held <= 20 * (2**15 + 2**16)
        await until(lambda: not server.listener.connections)
        assert server.memory.used_by(account) == 0
        assert value(server, "streams_total", "disconnected") == 20


async def test_reader_without_memory_left_is_aborted(puppet: Puppet) -> None:
    async with serve(puppet, replay_size=8 * MEBIBYTE) as server:
        await finish(server, puppet, "x" * (3 * MEBIBYTE))
        account = account_of("ada")
        share = (server.memory.limit - server.memory.used + server.memory.cached) // 9
        assert server.memory.acquire(account, share)
        async with Chat.open(server) as chat:
            chat.browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
            chat.send("GET", f"/api/chat/{ID}", headers=bearer("ada"))
            await until(lambda: value(server, "readers_aborted_total", "too much unsent") == 1)
        await until(lambda: server.memory.used_by(account) == share)
        server.memory.release(account, share)


async def test_body_that_is_never_read_ends_with_the_send_timeout(puppet: Puppet) -> None:
    """A reply that fits into the buffers of the kernel is delivered; one that does not is not."""
    async with serve(puppet, send_timeout=0.2) as server:
        async with Chat.open(server) as chat:
            await chat.prompt({"prompt": "Hello?"}, headers=bearer("ada"))
            chat.browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
            reply = await puppet.reply()
            reply.say("x" * (3 * MEBIBYTE))
            await until(lambda: value(server, "readers_aborted_total", "does not read") == 1)
            await reply.closed.wait()
            await until(lambda: not server.app.hub.live)


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_stop_of_a_model_that_does_not_end_is_answered(puppet: Puppet, method: str) -> None:
    async with serve(puppet, stop_timeout=0.3, open_timeout=0.2) as server:
        async with Chat.open(server) as chat, Chat.open(server) as other:
            await chat.prompt({"prompt": "Hello?", "id": ID}, headers=bearer("ada"))
            reply = await puppet.reply()
            reply.hold = asyncio.Event()
            target = f"/api/chat/{ID}" + "/stop" * (method == "POST")
            status, stopped = await other.ask(method, target, headers=bearer("ada"))
            assert (status, stopped["ids"]) == (200, [ID])
            assert (await chat.text())[1]["type"] == "done"
            reply.hold.set()
