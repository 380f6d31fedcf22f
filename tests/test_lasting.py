"""Conversations over restarts, and with stores that fail or hang."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.talk import ID, ONE, exchange, opened, resume
from wsserver.errors import StoreError
from wsserver.stores import MemoryStore
from wsserver.stores.base import Entry, StoredGeneration


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/deep/conversations.sqlite"


async def test_conversations_survive_restart(puppet: Puppet, file: str) -> None:
    async with wsserver.serve(puppet, port=0, store=file) as server, client(server) as chat:
        await exchange(chat, puppet, "I am Ann", "Hello Ann", conversation=ONE, id=ID)
        done = chat.frames[-1]
    async with wsserver.serve(puppet, port=0, store=file, drain_timeout=0) as server:
        async with client(server) as chat:
            history = await opened(chat)
            assert [m["content"] for m in history["messages"]] == ["I am Ann", "Hello Ann"]
            await resume(chat)
            assert await chat.text(ID) == ("Hello Ann", done)
            await chat.prompt("I am Ann", conversation=ONE, id=ID)  # its reply exists already
            assert (await chat.next("done", id=ID)) == done
            await chat.prompt("Who am I?")
            await puppet.reply(1)
    said = [m.content for m in puppet.replies[1].request.messages]
    assert said == ["I am Ann", "Hello Ann", "Who am I?"]


async def test_shutdown_mid_stream_loses_nothing(puppet: Puppet, file: str) -> None:
    async with wsserver.serve(puppet, port=0, store=file, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.prompt("Talk", conversation=ONE, id=ID)
            (await puppet.reply()).say(*["word "] * 1000)
            await chat.next("token", seq=1000)
            await server.close()
            await chat.closed()
    async with wsserver.serve(puppet, port=0, store=file) as server, client(server) as chat:
        await resume(chat)
        text, done = await chat.text(ID)
        assert (text, done["by"], done["seq"]) == ("word " * 1000, "shutdown", 1000)


class Broken(MemoryStore):
    """A store that fails or hangs on demand."""

    failing = False
    failures = 0
    hanging: asyncio.Event | None = None

    async def commit(self, entries: Sequence[Entry]) -> None:
        if self.hanging is not None:
            await self.hanging.wait()
        self._check()
        await super().commit(entries)

    async def load(self, *args: Any, **bounds: Any) -> Any:
        self._check()
        return await super().load(*args, **bounds)

    def _check(self) -> None:
        if self.failing:
            self.failures += 1
            raise StoreError("the disk with the secret is full")


@pytest.fixture
async def broken(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> AsyncIterator[tuple[Broken, wsserver.Server]]:
    store = Broken()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    async with wsserver.serve(
        puppet, port=0, save_interval=0.001, store_timeout=0.05, drain_timeout=0
    ) as server:
        yield store, server


async def test_stream_continues_with_failing_store_and_done_is_unsaved(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    store, server = broken
    async with client(server) as chat:
        await exchange(chat, puppet, "Saved", "x")
        assert "saved" not in chat.frames[-1]
        store.failing = True
        start = await chat.prompt("Not saved")
        reply = (await puppet.reply(1)).say("still ")
        await chat.next("token")
        reply.say("here").end()
        text, done = await chat.text(start["id"])
        assert (text, done["saved"], done["reason"]) == ("still here", False, "end_turn")
        assert "secret" not in str(chat.frames)
        errors = [r for r in caplog.records if "batch not saved" in r.getMessage()]
        assert len(errors) == 1, "an outage is logged once"
        store.failing = False
        await exchange(chat, puppet, "Saved again", "x")
        assert "saved" not in chat.frames[-1]
        said = [m.content for m in puppet.replies[2].request.messages]
        assert "still here" in said, "the model still sees the unsaved turn"


async def test_unsaved_replies_are_saved_after_store_recovers(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet
) -> None:
    store, server = broken
    async with client(server) as chat:
        store.failing = True
        await chat.prompt("Talk", id=ID)
        reply = (await puppet.reply()).say("during ")
        await chat.next("token")
        await until(lambda: store.failures)
        store.failing = False
        reply.say("after").end()
        assert "saved" not in (await chat.next("done"))
        found = await store.find("anonymous", ID)
        assert isinstance(found, StoredGeneration)
        assert found.pieces.data == ["during ", "after"]


async def test_hanging_store_delays_end_by_store_timeout(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet
) -> None:
    store, server = broken
    store.hanging = asyncio.Event()
    async with client(server) as chat:
        start = await chat.prompt("Talk")
        (await puppet.reply()).say("x").end()
        text, done = await chat.text(start["id"])
        assert (text, done["saved"]) == ("x", False)
        await exchange(chat, puppet, "Meanwhile", "y")
        assert chat.frames[-1]["saved"] is False
        await chat.send({"type": "list"})
        await chat.next("conversations")
        store.hanging.set()
        store.hanging = None
        await exchange(chat, puppet, "Next", "z")
        assert "saved" not in chat.frames[-1]
        history = await opened(chat, start["conversation"])
        said = [m["content"] for m in history["messages"]]
        assert said == ["Talk", "x", "Meanwhile", "y", "Next", "z"], (
            "all turns are saved in the end"
        )


async def test_hanging_store_does_not_block_shutdown(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    store = Broken()
    store.hanging = asyncio.Event()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    before = asyncio.all_tasks()
    async with wsserver.serve(
        puppet, port=0, drain_timeout=0, shutdown_timeout=0.3, store_timeout=1000, stop_timeout=1000
    ) as server:
        async with client(server) as chat:
            await chat.prompt("Talk")
            (await puppet.reply()).say("x")
            await chat.next("token")
            async with asyncio.timeout(BOUND):
                await server.close()
            await chat.closed()
    store.hanging.set()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_prompt_during_delete_is_answered_or_refused(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Secret", "x", conversation=ONE)
    async with client(server) as other:
        await chat.send({"type": "delete", "conversation": ONE})
        await other.send({"prompt": "New", "conversation": ONE})
        await chat.next("deleted")
        answer = await other.next("start", "error")
        if answer["type"] == "error":
            assert answer["code"] == "not_found"
            return
        await other.send({"type": "stop", "id": answer["id"]})
        done = await other.next("done")
        assert done["by"] in {"deleted", "client"}
        if done["by"] == "client":  # the server read the prompt after the delete
            for reply in puppet.replies[1:]:
                assert [m.content for m in reply.request.messages] == ["New"]


async def test_unreadable_conversation_is_retryable_error(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet
) -> None:
    store, server = broken
    async with client(server) as chat:
        store.failing = True
        error = await opened(chat)
        assert (error["code"], error["retryable"], error["about"]) == ("store", True, ONE)
        assert (await chat.prompt("x", conversation=ONE))["code"] == "store"
        store.failing = False
        assert (await chat.prompt("x", conversation=ONE))["type"] == "start"


async def test_stop_overtakes_prompt_waiting_for_store(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def load(self, *args: Any, **bounds: Any) -> Any:
            await gate.wait()
            return await super().load(*args, **bounds)

    monkeypatch.setattr("wsserver.stores.make", lambda *_: Slow())
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        await chat.send({"prompt": "x", "conversation": ONE, "id": ID})
        assert await chat.quiet() == []
        await chat.send({"type": "stop"})
        assert await chat.quiet() == []
        gate.set()
        await chat.next("start", id=ID)
        assert (await chat.next("done", id=ID))["by"] == "client"
        assert all(not reply.said for reply in puppet.replies)


async def test_requests_over_queue_limit_are_refused(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def list(self, owner: str, limit: int, before: Any) -> Any:
            await gate.wait()
            return await super().list(owner, limit, before)

    monkeypatch.setattr("wsserver.stores.make", lambda *_: Slow())
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        for _ in range(40):
            await chat.send({"type": "list"})
        refused = await chat.quiet()
        assert {frame["code"] for frame in refused} == {"limit"}
        gate.set()
        for _ in range(40 - len(refused)):
            await chat.next("conversations")


@pytest.mark.parametrize("store", ["postgres://x", "sqlite://", "sqlite:///", "nonsense"])
async def test_invalid_store_raises_config_error(puppet: Puppet, store: str) -> None:
    with pytest.raises(wsserver.ConfigError, match="store: "):
        async with wsserver.serve(puppet, port=0, store=store):
            raise AssertionError


async def test_history_has_at_most_history_messages(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, history_messages=3, drain_timeout=0) as server:
        async with client(server) as chat:
            for number in range(4):
                await exchange(chat, puppet, f"q{number}", f"a{number}")
    said = [m.content for m in puppet.replies[3].request.messages]
    assert said == ["q2", "a2", "q3"]
