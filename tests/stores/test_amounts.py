"""How much owners have and spend, and the clock."""

import asyncio
from dataclasses import replace

import pytest

from tests.stores.support import (
    DAY,
    SECONDS,
    Clock,
    costing,
    done,
    entry,
    failed,
    found,
    header,
    loaded,
    names,
    tokens_spent,
    whole,
)
from tests.support.pieces import Thinking
from wsserver.content import Usage
from wsserver.errors import Code
from wsserver.prices import Spent
from wsserver.stores import Store
from wsserver.stores.base import (
    Amounts,
    Entry,
    day_of,
)

pytestmark = pytest.mark.slow


async def test_held_counts_bytes_and_conversations_of_owner(store: Store) -> None:
    assert await store.amounts("me") == Amounts(0, 0)
    await store.commit([whole(header("1"), "x" * 10_000), whole(header("2"), Thinking("é" * 1000))])
    first = await store.amounts("me")
    assert 12_000 < first.bytes < 17_000
    assert first.conversations == 1
    await store.commit(
        [
            whole(header("3", "d"), "x" * 1000),
            whole(header("4", None), "x" * 5000),
            whole(header("1", owner="you"), "x"),
        ]
    )
    held = await store.amounts("me")
    assert first.bytes + 6000 < held.bytes < first.bytes + 11_000
    assert held.conversations == 2
    assert (await store.amounts("you")).conversations == 1
    await store.commit([whole(header("1"), "x" * 10_000)])  # a second time
    assert await store.amounts("me") == held
    await store.delete("me", "c")
    await store.purge(1e12)
    left = await store.amounts("me")
    assert 1000 < left.bytes < 4000
    assert left.conversations == 1
    await store.delete("me", "d")
    assert await store.amounts("me") == Amounts(0, 0)


async def test_last_used_conversation_is_first_after_clock_set_back(
    store: Store, clock: Clock
) -> None:
    for name in "abc":
        clock.now += 1
        await store.commit([whole(header(name, name))])
    clock.now -= 3600
    await store.commit([whole(header("b2", "b"))])
    await store.commit([whole(header("d", "d"))])
    assert await names(store) == ["d", "b", "c", "a"]
    summaries = {summary.id: summary for summary in await store.list("me", 10, None)}
    assert (summaries["b"].created, summaries["b"].updated) == (1002.0, 1002.0)
    assert summaries["d"].updated == clock.now
    page = await store.list("me", 1, summaries["d"].place)
    assert [summary.id for summary in page] == ["b"]


async def test_idle_returns_conversations_unused_since_a_time(store: Store, clock: Clock) -> None:
    for name in "abc":
        await store.commit([whole(header(name, name, owner=f"of {name}"))])
        clock.now += 10
    await store.commit([whole(header("a2", "a", owner="of a"))])
    assert await store.idle(1000.0, 10) == []
    assert await store.idle(1025.0, 10) == [("of b", "b"), ("of c", "c")]
    assert await store.idle(1025.0, 1) == [("of b", "b")]
    assert {owner for owner, _ in await store.idle(1e9, 10)} == {"of a", "of b", "of c"}


async def test_probe_changes_nothing(store: Store) -> None:
    await store.commit([whole(header())])
    await store.probe()
    assert await found(store) == ["Hi."]


@pytest.mark.parametrize(
    ("seconds", "day"),
    [(0.0, 0), (DAY - 0.1, 0), (DAY, 1), (-0.1, -1), (1_700_000_000.5, 19675)],
)
def test_day_is_counted_in_utc(seconds: float, day: int) -> None:
    assert day_of(seconds) == day
    assert type(day_of(seconds)) is int


async def test_tokens_count_for_owner_and_day_of_end(store: Store, clock: Clock) -> None:
    assert await tokens_spent(store, "me", 0) == 0
    await store.commit(
        [
            whole(header("1"), terminal=costing(10)),
            whole(header("2", None), terminal=costing(200)),
            whole(header("2", None, owner="you"), terminal=costing(3000)),
            whole(header("2", None, began=501.0), terminal=costing(40_000)),
            whole(header("3"), terminal=failed(Code.OVERLOADED)),
        ]
    )
    clock.now = DAY - 1
    await store.commit([whole(header("4"), terminal=costing(500_000))])
    clock.now = DAY
    await store.commit([whole(header("5"), terminal=costing(7))])
    assert [await tokens_spent(store, "me", day) for day in (-1, 0, 1, 2)] == [0, 540_210, 7, 0]
    assert [await tokens_spent(store, "you", day) for day in (0, 1)] == [3000, 0]
    assert await tokens_spent(store, "nobody", 0) == 0


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
async def test_tokens_count_when_reply_ends(store: Store, clock: Clock) -> None:
    await store.commit([entry(header(), True, 0, ["a"])])
    await store.commit([entry(header(), False, 1, ["b"])])
    assert await tokens_spent(store, "me", 0) == 0
    clock.now = DAY
    await store.commit([entry(header(), False, 2, ["c"], costing(10))])
    assert [await tokens_spent(store, "me", day) for day in (0, 1)] == [0, 10]


@pytest.mark.parametrize("conversation", ["c", None])
async def test_reply_committed_twice_is_counted_once(
    store: Store, clock: Clock, conversation: str | None
) -> None:
    asked = header(conversation=conversation)
    first = whole(asked, terminal=costing(10))
    end = entry(asked, False, 1, [], costing(10))
    for batch in ([first], [first, first], [end], [first, end]):
        await store.commit(batch)
        assert await tokens_spent(store, "me", 0) == 10
    clock.now = DAY
    await store.purge(0.0)
    await store.commit([end])
    assert [await tokens_spent(store, "me", day) for day in (0, 1)] == [10, 0]


@pytest.mark.parametrize("repeated", [entry(header(), False, 1, [], done()), whole(header())])
async def test_delete_of_conversation_keeps_spent_tokens(
    store: Store, clock: Clock, repeated: Entry
) -> None:
    await store.commit([whole(header()), whole(header("h"))])
    assert await tokens_spent(store, "me", 0) == 16
    assert await store.delete("me", "c")
    assert await tokens_spent(store, "me", 0) == 16
    await store.commit([repeated])  # because the first commit was not confirmed
    assert await tokens_spent(store, "me", 0) == 16


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
async def test_reply_ended_after_delete_is_counted(store: Store, clock: Clock) -> None:
    await store.commit([entry(header(), True, 0, ["a"])])
    assert await store.delete("me", "c")
    for _ in range(2):
        await store.commit([entry(header(), False, 1, ["b"], done())])
        assert await tokens_spent(store, "me", 0) == 8
    assert await names(store) == []


async def test_purge_keeps_spent_tokens(store: Store, clock: Clock) -> None:
    asked = header(conversation=None)
    await store.commit([whole(asked), whole(header("h"))])
    await store.purge(1e12)
    assert await found(store) is None
    await store.commit([entry(asked, False, 1, [], done())])
    assert await tokens_spent(store, "me", 0) == 16


async def test_purge_keeps_accounts_of_last_90_days(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("1"))])
    clock.now = DAY
    await store.purge(1e12)
    assert await tokens_spent(store, "me", 0) == 8
    clock.now = 91 * DAY
    await store.commit([whole(header("2"))])
    await store.purge(0.0)
    assert [await tokens_spent(store, "me", day) for day in (0, 91)] == [0, 8]


async def test_usage_over_maximum_counts_as_maximum(store: Store, clock: Clock) -> None:
    huge = Usage(input_tokens=10**30, cache_read_input_tokens=10**30)
    terminal = done().model_copy(update={"usage": huge})
    await store.commit([whole(header(str(number)), terminal=terminal) for number in range(3)])
    assert await tokens_spent(store, "me", 0) == 3 * 10**12


async def test_concurrent_commits_and_reads_do_not_mix(store: Store) -> None:
    async def converse(name: str) -> None:
        for number in range(5):
            asked = header(f"{name}{number}", name)
            await store.commit([entry(asked, True, 0, ["a"])])
            await store.commit([entry(asked, False, 1, ["b"], done())])
            assert await found(store, f"{name}{number}") == ["a", "b"]

    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(converse(name) for name in "abcdefgh"))
    assert sorted(await names(store)) == list("abcdefgh")
    for name in "abcdefgh":
        turns = (await loaded(store, name)).turns
        assert [(turn.id, turn.text) for turn in turns] == [(f"{name}{n}", "ab") for n in range(5)]


async def test_second_close_does_nothing(store: Store) -> None:
    await store.close()
    await store.close()


@pytest.mark.usefixtures("clock")
async def test_cost_is_counted_at_price_of_model(store: Store) -> None:
    usage = Usage(100, 10, 1000, 10_000)
    for name, model in (("1", "claude-sonnet-4-6"), ("2", "claude-opus-5"), ("3", "demo")):
        terminal = done().model_copy(update={"usage": usage})
        await store.commit([whole(replace(header(name), model=model), terminal=terminal)])
    tokens = 100 + 10 + 1250 + 1000
    sonnet = 100 * 3 + 10 * 15 + 1000 * 3.75 + 10_000 * 0.3
    opus = 100 * 5 + 10 * 25 + 1000 * 6.25 + 10_000 * 0.5
    assert await store.spent("me", 0) == Spent(3 * tokens, int(sonnet + opus))
