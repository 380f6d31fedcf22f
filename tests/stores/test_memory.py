"""The memory store: its counts and limits."""

import random
import tracemalloc

import pytest

from tests.stores.support import (
    DAY,
    Clock,
    done,
    entry,
    found,
    header,
    loaded,
    names,
    tokens_spent,
    trace_of,
    whole,
)
from tests.support.work import counted
from wsserver.limits import Memory
from wsserver.stores import MemoryStore
from wsserver.stores.base import (
    Amounts,
    Forgotten,
)

pytestmark = pytest.mark.slow


async def test_longest_idle_conversation_is_dropped_over_limit() -> None:
    store = MemoryStore(2)
    await store.commit([whole(header("1", "a")), whole(header("2", "b"))])
    await store.commit([entry(header("3", "a"), True, 0, ["x"])])
    await store.commit([whole(header("4", None))])  # without a conversation, so it does not count
    await store.commit([whole(header("5", "c"))])
    assert sorted(await names(store)) == ["a", "c"]
    assert await found(store, "2") is None
    await store.commit([entry(header("3", "a"), False, 1, ["y"])])  # also a use
    await store.commit([whole(header("6", "d"))])
    assert sorted(await names(store)) == ["a", "d"]
    assert await found(store, "3") == ["x", "y"]
    assert await found(store, "4") == ["Hi."]


async def test_drop_keeps_conversation_of_other_owner_with_same_id() -> None:
    store = MemoryStore(2)
    await store.commit([whole(header()), whole(header(owner="you")), whole(header("h", "d"))])
    assert await names(store) == ["d"]
    assert await names(store, "you") == ["c"]
    assert (await found(store), await found(store, owner="you")) == (None, ["Hi."])


async def test_pieces_of_dropped_conversation_are_not_kept() -> None:
    store = MemoryStore(1)
    await store.commit([entry(header("1", "a"), new=True), entry(header("2", "b"), new=True)])
    await store.commit([entry(header("1", "a"), False, 0, ["x"], done())])
    assert await names(store) == ["b"]
    assert await found(store, "1") is None


async def test_accounts_are_kept_for_today_and_yesterday(clock: Clock) -> None:
    store = MemoryStore(1)
    for day in range(5):
        clock.now = day * DAY
        await store.commit([whole(header(f"{day} {name}", name)) for name in "ab"])
        await store.purge(0.0)
        assert await tokens_spent(store, "me", day) == 16
    assert [await tokens_spent(store, "me", day) for day in range(6)] == [0, 0, 0, 16, 16, 0]


async def test_oldest_content_is_dropped_first_over_memory_limit() -> None:
    memory = Memory(100_000)
    store = MemoryStore(memory=memory)
    for name in "abc":
        await store.commit([whole(header(name, name), "x" * 20_000)])
    await store.commit([whole(header("o", None), "x" * 20_000)])
    assert await names(store) == ["c", "b", "a"]
    await store.commit([whole(header("a2", "a"), "x" * 12_000)])
    assert await found(store, "o") is None
    assert await names(store) == ["a", "c", "b"]
    await store.commit([whole(header("a3", "a"), "x" * 30_000)])
    assert await names(store) == ["a", "c"]
    await store.commit([whole(header("a4", "a"), "x" * 90_000)])
    assert [turn.id for turn in (await loaded(store, "a")).turns] == ["a4"]
    assert (await loaded(store, "a")).turns[0].number == 4
    assert isinstance(await store.find("me", "a"), Forgotten)
    assert memory.used < 100_000
    await store.delete("me", "a")
    assert (memory.used, await store.amounts("me")) == (0, Amounts(0, 0))


async def test_counted_bytes_match_allocated_memory() -> None:
    memory = Memory(10**9)
    store = MemoryStore(memory=memory)
    chance = random.Random(3)
    for text in ("plain " * 200, "é" * 800, "漢" * 700, "🎈" * 600, "x🎈" * 500):
        await store.commit([whole(header("warm", "warm"), "x")])
        tracemalloc.start()
        before, counted = tracemalloc.get_traced_memory()[0], memory.used
        for number in range(300):
            name = f"{text[0]}{number}"
            pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
            batch = whole(header(name, f"c{chance.randrange(20)}", prompt=text), *pieces)
            await store.commit([batch])
            del batch, pieces
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        grown = memory.used - counted
        assert 0.8 < grown / held < 1.3, (text[:2], grown, held)


async def test_cost_of_a_page_does_not_grow_with_conversations() -> None:
    async def work_beside(others: int) -> int:
        store = MemoryStore()
        await store.commit([whole(header(f"g{n}", f"c{n}")) for n in range(others)])
        again = whole(header("again", "c7"))
        with counted() as work:
            page = await store.list("me", 20, None)
            older = await store.list("me", 20, page[-1].place)
            await store.commit([again])
        assert [summary.id for summary in page] == [f"c{others - n}" for n in range(1, 21)]
        assert older[0].id == f"c{others - 21}"
        return work.instructions

    assert await work_beside(5000) < 1.1 * await work_beside(50)


async def test_purge_runs_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.stores.memory.PURGED_AT_ONCE", 2)
    store = MemoryStore()
    await store.commit([whole(header(f"g{n}", None)) for n in range(5)])
    await store.commit([whole(header(f"h{n}")) for n in range(5)])

    async def kept() -> int:
        return len([n for n in range(5) for kind in "gh" if await found(store, f"{kind}{n}")])

    left = []
    while await store.purge(1e12):
        left.append(await kept())
    assert (left, await kept()) == ([8, 6], 5)


async def test_oldest_traces_of_all_owners_are_dropped_over_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsserver.stores.memory.ALL_TRACES", 3)
    store = MemoryStore()
    for number in range(5):
        await store.commit([whole(header("g", None, owner=f"o{number}"))])
        await store.purge(1e12)
    assert [await trace_of(store, "g", f"o{n}") is None for n in range(5)] == [
        True,
        True,
        False,
        False,
        False,
    ]


async def test_owner_without_content_uses_no_memory(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr("wsserver.stores.memory.ALL_TRACES", 3)
    store = MemoryStore()

    async def come_and_go(day: int) -> None:
        clock.now = day * DAY
        for number in range(300):
            owner = f"{day}-{number}"
            await store.commit(
                [whole(header("g", owner=owner)), whole(header("h", None, owner=owner))]
            )
            await store.delete(owner, "c")
            await store.purge(1e12)

    await come_and_go(1)
    tracemalloc.start()
    try:
        for day in range(3, 12, 3):
            await come_and_go(day)
        clock.now += 3 * DAY
        await store.purge(1e12)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown < 50 * 900, grown / 900
