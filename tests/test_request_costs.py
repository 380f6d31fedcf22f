"""Costs of requests: bytes that an account reads, and memory. Requests whose client leaves."""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import wsserver
from tests.support.client import client
from tests.support.gated import Gated, GatedStore, gated_server
from tests.support.puppet import BOUND, Puppet, until
from tests.support.talk import ID, ONE, exchange
from tests.test_slow_reader import sluggard


@pytest.fixture
async def gated(monkeypatch: pytest.MonkeyPatch, puppet: Puppet) -> AsyncIterator[Gated]:
    async with gated_server(monkeypatch, puppet) as made:
        yield made


# Reads.


async def test_account_over_read_limit_waits_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    monkeypatch.setattr("wsserver.hub.accounts.READ_BURST", 100_000)
    monkeypatch.setattr("wsserver.hub.accounts.READ_RATE", 0.001)

    async def named(token: str | None, _: wsserver.Handshake) -> wsserver.Principal:
        return wsserver.Principal(token or "nobody")

    async with wsserver.serve(puppet, port=0, authenticate=named, drain_timeout=0) as server:
        ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
        async with (
            client(server, additional_headers=ann) as chat,
            client(server, additional_headers=ann) as second,
            client(server, additional_headers=bob) as other,
        ):
            for one in (chat, other):
                await exchange(one, puppet, "Long", "x" * 60_000, conversation=ONE)
            for _ in range(2):
                await chat.send({"type": "open", "conversation": ONE})
                await chat.next("history")
            for frame in ({"type": "open", "conversation": ONE}, {"type": "list"}):
                await second.send(frame)
                error = await second.next("error", "history", "conversations")
                assert error["code"] == "limit"
                assert error["retry_after"] > 0
            await other.send({"type": "open", "conversation": ONE})
            await other.next("history")


@pytest.mark.parametrize("kind", ["resume", "prompt"])
async def test_ended_replies_read_from_store_count_for_read_limit(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet, kind: str
) -> None:
    monkeypatch.setattr("wsserver.hub.accounts.READ_BURST", 100_000)
    monkeypatch.setattr("wsserver.hub.accounts.READ_RATE", 0.001)
    async with wsserver.serve(puppet, port=0, replay_size=1, drain_timeout=0) as server:
        async with client(server) as chat:
            prompt = {"prompt": "Long", "conversation": ONE, "id": ID}
            await exchange(chat, puppet, "Long", "x" * 60_000, conversation=ONE, id=ID)
            frame = {"type": "resume", "id": ID, "after": 1} if kind == "resume" else prompt
            for _ in range(2):
                await chat.send(frame)
                await chat.next("done")
            await chat.send(frame)
            error = await chat.next("error", "start")
            assert error["code"] == "limit"
            assert error["retry_after"] > 0


# Requests whose client leaves.


@pytest.mark.parametrize("kind", ["rename", "delete"])
async def test_delete_of_client_not_reading_is_done_after_disconnect(
    puppet: Puppet, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0, write_buffer=4096) as server:
        async with client(server) as chat, sluggard(server) as lazy:
            await exchange(chat, puppet, "First", "x" * 60_000, conversation=ONE)
            socket, connection = list(server.app.connections.items())[1]
            sent = 0
            while socket.writable:
                await lazy.send(json.dumps({"type": "open", "conversation": ONE, "before": 9}))
                sent += 1
                await until(lambda n=sent: connection.frames == n and connection.idle_since)  # type: ignore[misc]
            frame = {"type": kind, "conversation": ONE}
            await lazy.send(json.dumps(frame | ({"title": "New"} if kind == "rename" else {})))
            await until(lambda: connection.idle_since is None)
            lazy.sock.close()
            await until(lambda: len(server.app.connections) == 1)
            async with asyncio.timeout(BOUND):
                while True:
                    await chat.send({"type": "open", "conversation": ONE})
                    answer = await chat.next("history", "error")
                    if answer.get("title") == "New" or answer.get("code") == "not_found":
                        break
            gc.collect()
            await asyncio.sleep(0)
    assert not [r for r in caplog.records if "destroyed" in r.getMessage()]


async def test_waiting_rename_is_done_before_server_closes(gated: Gated, puppet: Puppet) -> None:
    store, server = gated
    async with client(server) as chat:
        await exchange(chat, puppet, "First", "x", conversation=ONE)
        await chat.send({"type": "rename", "conversation": ONE, "title": "New"})
        assert await chat.quiet() == []
    await until(lambda: not server.app.connections)
    closing = asyncio.ensure_future(server.close())
    store.gate.set()
    await closing
    stored = await store.load("anonymous", ONE, limit=1, size=1000)
    assert stored is not None
    assert stored.title == "New"


# Memory.


async def test_waiting_request_bytes_are_counted_and_returned(
    gated: Gated,
) -> None:
    store, server = gated
    async with client(server) as chat, client(server) as gone:
        used = server.memory.used
        for one in (chat, gone):
            await one.send({"type": "list"})
            for number in range(8):
                await one.send({"prompt": "x" * 30_000, "model": f"unknown-{number}"})
            await one.quiet()
        assert server.memory.used - used > 16 * 30_000
        await gone.socket.close()
        await until(lambda: len(server.app.connections) == 1)
        assert 8 * 30_000 < server.memory.used - used < 9 * 31_000
        store.gate.set()
        for _ in range(8):
            assert (await chat.next("error"))["code"] == "model_not_allowed"
        assert await chat.quiet() == []
        assert server.memory.used == used


async def test_request_without_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    store = GatedStore()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        server.memory.limit = 600_000
        async with client(server) as chat:
            await chat.send({"type": "list"})
            for number in range(4):
                await chat.send({"prompt": "x" * 30_000, "request": f"r{number}"})
            await chat.quiet()
            store.gate.set()
            error = await chat.next("error", request="r3")
            assert (error["code"], error["retryable"]) == ("limit", True)
            assert "too large" in error["message"]


@pytest.mark.parametrize(
    "frame", ['{"prompt": "%s", "unknown": 1}', '{"prompt": "%s"', '{"prompt": "%s"}']
)
async def test_waiting_error_keeps_no_message_in_memory(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet, frame: str
) -> None:
    store = GatedStore()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    async with wsserver.serve(puppet, port=0, drain_timeout=0, bad_frames=100) as server:
        async with client(server) as chat:
            await chat.send({"type": "list"})
            await chat.quiet()
            server.memory.limit = server.memory.used + 8 * 150_000
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                for _ in range(20):
                    await chat.send(frame % ("🙂" * 15_000))
                await chat.quiet()
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert after - before < 6 * 60_000
            store.gate.set()
            for _ in range(20):
                await chat.next("start", "error")


async def test_reply_ends_when_account_has_no_memory(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        async with client(server) as chat:
            used = server.memory.used
            start = await chat.prompt("Talk")
            reply = await puppet.reply()
            reply.say(*["🙂" * 10_000] * 3)
            await chat.next("token", seq=3)
            assert server.memory.used - used >= 3 * 40_000
            server.memory.limit = 600_000
            reply.say(*["🙂" * 10_000] * 50)
            _, done = await chat.text(start["id"])
            assert done["reason"] == "max_tokens"
            assert 3 <= done["seq"] < 53


async def test_ended_replies_are_dropped_for_memory_in_use(puppet: Puppet, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/conversations.sqlite"
    async with wsserver.serve(puppet, port=0, store=store, drain_timeout=0) as server:
        async with client(server) as chat:
            for number in range(5):
                messages = [{"role": "user", "content": "x"}]
                await chat.send({"messages": messages, "id": f"{ID}-{number}"})
                (await puppet.reply(number)).say("🙂" * 10_000).end()
                await chat.text(f"{ID}-{number}")
            memory = server.memory
            before = memory.cached
            assert before >= 5 * 40_000
            memory.limit = memory.used
            assert memory.acquire(("somebody",), 10_000)
            assert before - 2 * 45_000 <= memory.cached <= before - 10_000
            for number in range(5):  # the store still has the reply that was dropped
                await chat.send({"type": "resume", "id": f"{ID}-{number}"})
                assert (await chat.next("token"))["text"] == "🙂" * 10_000
