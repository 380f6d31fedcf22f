"""Generations, their traces, and the turns that are not in the history."""

import pytest

from tests.stores.support import (
    DAY,
    PIECES,
    TOKENS,
    Clock,
    done,
    entry,
    failed,
    found,
    header,
    kinds,
    load,
    loaded,
    names,
    trace_of,
    whole,
)
from tests.support.pieces import Thinking, heard
from wsserver.content import Usage
from wsserver.errors import Code
from wsserver.protocol import Done, Error, Prompt, Terminal
from wsserver.stores import Store
from wsserver.stores.base import (
    TRACE_KEPT,
    Header,
    StoredGeneration,
)

pytestmark = pytest.mark.slow


async def test_generations_of_one_batch_are_found(store: Store) -> None:
    asked = header()
    await store.commit([whole(asked, "Hi", " there.")])
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == asked
    assert heard(stored.pieces) == ["Hi", " there."]
    assert stored.terminal == done()


async def test_generation_committed_in_parts_is_found_whole(store: Store) -> None:
    asked = header()
    batches = [
        entry(asked, new=True),
        entry(asked, after=0, pieces=["a"]),
        entry(asked, after=1),
        entry(asked, after=1, pieces=[Thinking("b"), "c"]),
        entry(asked, after=3, pieces=["d"], terminal=done()),
    ]
    expected = [[], ["a"], ["a"], ["a", Thinking("b"), "c"], ["a", Thinking("b"), "c", "d"]]
    for batch, pieces in zip(batches, expected, strict=True):
        await store.commit([batch])
        stored = await store.find("me", "g")
        assert isinstance(stored, StoredGeneration)
        assert kinds(heard(stored.pieces)) == kinds(pieces)
        assert stored.terminal == batch.terminal
    (turn,) = (await loaded(store)).turns
    assert turn.text == "acd"


async def test_batch_may_have_several_entries_of_one_generation(store: Store) -> None:
    asked = header()
    await store.commit(
        [
            entry(asked, new=True),
            entry(asked, after=0, pieces=["a", "b"]),
            entry(asked, after=2, pieces=["c"]),
            entry(asked, after=3, terminal=done()),
        ]
    )
    assert await found(store) == ["a", "b", "c"]


async def test_terminal_may_be_committed_without_pieces(store: Store) -> None:
    await store.commit([entry(header(), True, 0, ["a"])])
    await store.commit([entry(header(), terminal=done())])
    assert await found(store) == ["a"]


async def test_empty_batch_is_accepted(store: Store) -> None:
    await store.commit([])
    assert await names(store) == []


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_pieces_are_read_back_exactly_with_their_kinds(store: Store, size: int) -> None:
    asked = header()
    await store.commit([entry(asked, new=True)])
    for after in range(0, len(PIECES), size):
        await store.commit([entry(asked, after=after, pieces=PIECES[after : after + size])])
    stored = await found(store)
    assert stored is not None
    assert kinds(stored) == kinds(PIECES)
    (turn,) = (await loaded(store)).turns
    assert turn.text == "".join(piece for piece in PIECES if not isinstance(piece, Thinking))


async def test_thousand_pieces_stay_in_order(store: Store) -> None:
    asked = header()
    pieces = [str(number) for number in range(1200)]
    await store.commit([entry(asked, new=True)])
    for after in range(0, 1200, 100):
        await store.commit([entry(asked, after=after, pieces=pieces[after : after + 100])])
    assert await found(store) == pieces


async def test_prompt_is_read_back_with_all_keys(store: Store) -> None:
    prompt = Prompt(
        prompt="line one\nline two\0 🎈 \\",
        id="g" * 16,
        conversation="c" * 16,
        on_busy="queue",
        model="claude-☃",
        system="Be brief.",
        max_tokens=10**30,
        temperature=0.1,
    )
    asked = Header("g", "me", "c", prompt, "claude-☃", 1234567890.123456)
    await store.commit([entry(asked, new=True)])
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == asked
    (turn,) = (await loaded(store)).turns
    assert turn.prompt.blocks == prompt.prompt


@pytest.mark.parametrize(
    "terminal",
    [
        done(),
        done("max_tokens"),
        done("stopped", "client"),
        Done(
            id="g",
            seq=0,
            reason="ein Grund ☃ \0",
            usage=Usage(
                input_tokens=1,
                output_tokens=2,
                cache_creation_input_tokens=3,
                cache_read_input_tokens=10**20,
                estimated=True,
            ),
        ),
        failed(Code.INTERNAL),
        Error(
            code=Code.RATE_LIMITED,
            message="Später. 🐌",
            id="g",
            seq=7,
            retryable=True,
            retry_after=1.5,
            usage=TOKENS,
            ref="r",
        ),
    ],
    ids=["done", "max_tokens", "stopped", "all of done", "error", "all of error"],
)
async def test_terminal_is_read_back_unchanged(store: Store, terminal: Terminal) -> None:
    await store.commit([whole(header(), terminal=terminal)])
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert stored.terminal == terminal


async def test_repeated_commit_changes_nothing(store: Store) -> None:
    asked, outside = header(), header("o", None)
    first = [entry(asked, True, 0, ["a", "b"]), entry(outside, True, 0, ["x"])]
    then = [entry(asked, False, 2, ["c"], done()), entry(outside, False, 1, ["y"], done())]
    for batch in (first, first, then, then, first, [*first, *then, *first]):
        await store.commit(batch)
    assert await found(store) == ["a", "b", "c"]
    assert await found(store, "o") == ["x", "y"]
    stored = await loaded(store)
    assert [(turn.text, turn.partial) for turn in stored.turns] == [("abc", None)]


async def test_overlapping_entries_are_saved_once(store: Store) -> None:
    asked = header()
    await store.commit([entry(asked, True, 0, ["a"])])
    await store.commit([entry(asked, True, 0, ["a", "b"])])
    await store.commit([entry(asked, False, 2, ["c"])])
    await store.commit([entry(asked, True, 0, ["a", "b", "c", "d"])])
    await store.commit([entry(asked, False, 1, ["b", "c"])])
    await store.commit([entry(asked, True, 0, ["a"])])
    assert await found(store) == ["a", "b", "c", "d"]


async def test_find_returns_latest_generation_of_reused_id(store: Store) -> None:
    old, new = header(began=1.0), header(began=2.0, prompt="And now?")
    await store.commit([whole(old, "old")])
    await store.commit([whole(new, "new")])
    assert await found(store) == ["new"]
    await store.commit(
        [whole(old, "old")]
    )  # a second time, because the first commit was not confirmed
    assert await found(store) == ["new"]
    assert [turn.text for turn in (await loaded(store)).turns] == ["old", "new"]


async def test_older_generation_of_reused_id_gets_its_terminal(store: Store) -> None:
    old, new = header(began=1.0), header(began=2.0)
    await store.commit([entry(old, True, 0, ["old"]), entry(new, True, 0, ["new"])])
    await store.commit([entry(old, False, 1, ["er"], done("stopped", "client"))])
    assert await found(store) == ["new"]
    turns = (await loaded(store)).turns
    assert [(turn.text, turn.partial) for turn in turns] == [
        ("older", "client"),
        ("new", "interrupted"),
    ]


async def test_generation_of_other_owner_is_not_found(store: Store) -> None:
    await store.commit([whole(header())])
    assert await store.find("you", "g") is None
    assert await store.find("", "g") is None
    assert await store.find("me", "unknown") is None


async def test_owners_may_use_same_generation_id(store: Store) -> None:
    await store.commit([whole(header(conversation="a"), "mine")])
    await store.commit([whole(header(conversation="b", owner="you"), "yours")])
    assert await found(store) == ["mine"]
    assert await found(store, owner="you") == ["yours"]


async def test_running_generation_is_found(store: Store) -> None:
    await store.commit([entry(header(began=1.0), True, 0, ["a"])])
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert heard(stored.pieces) == ["a"]
    assert stored.terminal is None


async def test_generation_without_conversation_is_found_but_not_listed(store: Store) -> None:
    asked = header(conversation=None)
    await store.commit([whole(asked, "Hi.")])
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == asked
    assert heard(stored.pieces) == ["Hi."]
    assert await names(store) == []
    assert await load(store, "c", "me", 10) is None


async def test_caller_may_change_returned_objects(store: Store) -> None:
    said = ["a"]
    await store.commit([entry(header(), True, 0, said)])
    said.append("b")
    first = await found(store)
    assert first is not None
    first.append("c")
    (await loaded(store)).turns.clear()
    assert await found(store) == ["a"]
    assert len((await loaded(store)).turns) == 1


async def test_generation_is_found_until_delete(store: Store, clock: Clock) -> None:
    await store.commit([whole(header(), "a", Thinking("b"), "c")])
    clock.now += 365 * DAY
    await store.purge(clock.now)
    stored = await found(store)
    assert stored is not None
    assert kinds(stored) == kinds(["a", Thinking("b"), "c"])


async def test_delete_leaves_traces_of_generations(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("1")), entry(header("2"), True, 0, ["a"])])
    await store.commit([whole(header("1", owner="you"))])
    clock.now = 2000.0
    assert await store.delete("me", "c")
    assert [await trace_of(store, name) for name in "123"] == [2000.0, 2000.0, None]
    assert await found(store, "1", "you") == ["Hi."]
    assert await trace_of(store, "2", "you") is None


async def test_purge_leaves_trace_for_trace_kept_seconds(store: Store, clock: Clock) -> None:
    await store.commit([whole(header(conversation=None))])
    clock.now = 2000.0
    await store.purge(clock.now)
    assert await trace_of(store) == 2000.0
    clock.now += TRACE_KEPT
    await store.purge(0.0)
    assert await trace_of(store) == 2000.0
    clock.now += 1
    await store.purge(0.0)
    assert await trace_of(store) is None


async def test_oldest_traces_of_owner_are_dropped_over_limit(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.stores.memory.TRACES", 3)
    monkeypatch.setattr("wsserver.stores.sqlite.TRACES", 3)
    monkeypatch.setattr("wsserver.stores.postgres.store.TRACES", 3)
    await store.commit([whole(header(f"y{n}", "c", owner="you")) for n in range(2)])
    await store.delete("you", "c")
    for number in range(4):
        clock.now += 1
        await store.commit([whole(header(f"o{number}", None))])
        await store.purge(clock.now + 1)
    assert [await trace_of(store, f"o{n}") is None for n in range(4)] == [True, False, False, False]
    clock.now += 1
    await store.commit([whole(header(f"g{number}")) for number in range(5)])
    await store.delete("me", "c")
    assert [await trace_of(store, f"o{number}") for number in range(4)] == [None] * 4
    assert [await trace_of(store, f"g{number}") for number in range(5)] == [
        None,
        None,
        *[clock.now] * 3,
    ]
    assert [await trace_of(store, f"y{number}", "you") for number in range(2)] == [1000.0] * 2


async def test_forgotten_id_may_be_reused(store: Store) -> None:
    await store.commit([whole(header(conversation=None, began=1.0))])
    await store.purge(1e12)
    await store.commit([whole(header(began=2.0), "again")])
    assert await found(store) == ["again"]
