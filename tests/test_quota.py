"""Quotas of the store, and the retention time of conversations."""

import time
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet, until
from wsserver.errors import Code, Refused, StoreError
from wsserver.hub import quota, upkeep
from wsserver.hub.upkeep import Upkeep
from wsserver.stores import MemoryStore
from wsserver.stores.base import Forgotten

DAY = 86_400.0
ONE = "conversation-0001"


async def say(chat: Client, puppet: Puppet, text: str, **keys: Any) -> dict[str, Any]:
    """Prompt, have the model answer, and return the `start` or the error."""
    number = len(puppet.replies)
    answer = await chat.prompt("Hello", **keys)
    if answer["type"] == "start":
        (await puppet.reply(number)).say(text).end()
        await chat.text(answer["id"])
    return answer


@pytest.fixture(params=["memory:", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/chat.db" if request.param == "sqlite" else str(request.param)


async def test_owner_at_conversation_limit_continues_existing_ones(
    store: str, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "FRESH", 0.0)
    async with (
        wsserver.serve(puppet, port=0, store=store, conversations_per_principal=2) as server,
        client(server) as chat,
    ):
        for name in ("conversation-0001", "conversation-0002"):
            await say(chat, puppet, "x", conversation=name)
        refused = await say(chat, puppet, "x", conversation="conversation-0003")
        assert (refused["code"], refused["retryable"]) == ("limit", False)
        assert "conversations_per_principal" in refused["message"]
        assert (await say(chat, puppet, "x", conversation="conversation-0001"))["type"] == "start"
        await chat.send({"type": "delete", "conversation": "conversation-0002"})
        await chat.next("deleted")
        answer = await say(chat, puppet, "x", conversation="conversation-0003")
        assert answer["type"] == "start"
        assert len(puppet.replies) == 4


async def test_owner_over_byte_limit_is_refused(
    store: str, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "FRESH", 0.0)
    async with (
        wsserver.serve(puppet, port=0, store=store, bytes_per_principal=50_000) as server,
        client(server) as chat,
    ):
        first = {"id": "chosen-by-client", "conversation": "conversation-0001"}
        await say(chat, puppet, "x" * 30_000, **first)
        await say(chat, puppet, "x" * 30_000, conversation="conversation-0002")
        for keys in ({}, {"conversation": "conversation-0001"}):
            refused = await say(chat, puppet, "x", **keys)
            assert (refused["code"], refused["retryable"]) == ("limit", False)
            assert "bytes_per_principal" in refused["message"]
        assert len(puppet.replies) == 2
        again = await chat.prompt("Hello", **first)
        assert again["type"] == "start", "a prompt that is sent again stores nothing"
        await chat.send({"type": "delete", "conversation": "conversation-0002"})
        await chat.next("deleted")
        assert (await say(chat, puppet, "x", conversation="conversation-0001"))["type"] == "start"


async def test_store_quota_is_cached_until_reached(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "FRESH", 1000.0)
    asked = 0
    amounts = MemoryStore.amounts

    async def counted(self: MemoryStore, owner: str) -> Any:
        nonlocal asked
        asked += 1
        return await amounts(self, owner)

    monkeypatch.setattr(MemoryStore, "amounts", counted)
    async with (
        wsserver.serve(puppet, port=0, conversations_per_principal=5) as server,
        client(server) as chat,
    ):
        for _ in range(5):
            await say(chat, puppet, "x")
        assert asked == 1


async def test_conversations_are_deleted_after_retention_time(
    puppet: Puppet, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PAUSE", 0.0)
    monkeypatch.setattr(upkeep, "STEP", 2)
    now = time.time()
    async with (
        wsserver.serve(puppet, port=0, store=store, retention_days=30.0) as server,
        client(server) as chat,
        client(server) as watcher,
    ):
        monkeypatch.setattr(time, "time", lambda: now)
        names = [f"conversation-000{number}" for number in range(5)]
        for name in names:
            start = await say(chat, puppet, "x", conversation=name)
        await watcher.send({"type": "open", "conversation": names[0]})
        await watcher.next("history")
        now += 20 * DAY
        await say(chat, puppet, "x", conversation=names[2])
        now += 10 * DAY - 1
        await server.app.hub.upkeep.round()
        now += 2
        await server.app.hub.upkeep.round()
        await watcher.next("deleted", conversation=names[0])
        listed = await server.app.store.list("anonymous", 10, None)
        assert [summary.id for summary in listed] == [names[2]]
        assert isinstance(await server.app.store.find("anonymous", start["id"]), Forgotten)
        assert [known.id for known in server.app.hub.conversations] == [names[2]]
        answer = await say(chat, puppet, "x", conversation=names[0])
        assert answer["type"] == "start"
        assert [m.content for m in puppet.replies[-1].request.messages] == ["Hello"]


@pytest.mark.parametrize("ended", [True, False])
async def test_conversation_used_at_expiry_is_kept(
    puppet: Puppet, store: str, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    async with (
        wsserver.serve(puppet, port=0, store=store, retention_days=30.0, drain_timeout=0) as server,
        client(server) as chat,
    ):
        monkeypatch.setattr(time, "time", lambda: now)
        await say(chat, puppet, "x", conversation=ONE)
        now += 31 * DAY
        idle = server.app.store.idle

        async def used_meanwhile(before: float, limit: int) -> Any:
            found = await idle(before, limit)
            if found and len(puppet.replies) == 1:
                await chat.prompt("y", conversation=ONE)
                (await puppet.reply(1)).say("Hello")
                await chat.next("token")
                if ended:
                    puppet.replies[1].end()
                    await chat.next("done")
            return found

        monkeypatch.setattr(server.app.store, "idle", used_meanwhile)
        await server.app.hub.upkeep.round()
        assert len(puppet.replies) == 2
        if not ended:
            puppet.replies[1].end()
            assert (await chat.next("done"))["reason"] == "end_turn"
        await chat.send({"type": "open", "conversation": ONE})
        assert len((await chat.next("history"))["messages"]) == 4


async def test_undeletable_conversation_does_not_keep_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "PAUSE", 0.0)
    monkeypatch.setattr(upkeep, "STEP", 2)
    names = [f"conversation-000{number}" for number in range(7)]
    stuck = names[:3]

    class Old(MemoryStore):
        async def idle(self, before: float, limit: int) -> list[tuple[str, str]]:
            return [("me", name) for name in names][:limit]

    async def delete(owner: str, name: str, *, before: float) -> None:
        if name in stuck[:2]:
            raise StoreError("bad row")
        if name == stuck[2]:
            raise Refused(Code.BUSY)
        names.remove(name)

    tended = Upkeep(Old(), delete, replay=0.0, retention=1.0)
    await tended.round()
    await tended.close()
    assert names == stuck
    assert caplog.text.count("conversation not deleted") == 2


async def test_conversations_are_kept_forever_by_default(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        await say(chat, puppet, "x")
        now = time.time() + 10_000 * DAY
        monkeypatch.setattr(time, "time", lambda: now)
        await server.app.hub.upkeep.round()
        assert len(await server.app.store.list("anonymous", 10, None)) == 1


async def test_upkeep_continues_after_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "EVERY", 0.0)
    failures: list[Exception] = [StoreError("disk"), ZeroDivisionError("secret")]
    rounds = 0

    class Failing(MemoryStore):
        async def purge(self, until: float) -> bool:
            nonlocal rounds
            rounds += 1
            if failures:
                raise failures.pop(0)
            return False

    async def delete(owner: str, name: str, *, before: float) -> None:
        raise AssertionError

    tended = Upkeep(Failing(), delete, replay=0.0, retention=0.0)
    await until(lambda: rounds > 3)
    await tended.close()
    await tended.close()
    assert caplog.text.count("store not purged") == 1
    assert "secret" not in caplog.text
