"""Stores over a restart: generations that had not ended are interrupted."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.stores.support import (
    Clock,
    done,
    entry,
    found,
    header,
    kinds,
    listed,
    load,
    loaded,
    names,
    query,
    whole,
)
from tests.support.pieces import Thinking, heard
from wsserver.stores import Store, sqlite
from wsserver.stores.base import (
    StoredGeneration,
    Summary,
)
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
async def test_reply_continues_after_other_owner_deletes_same_id(
    store: Store,
) -> None:
    await store.commit([whole(header(owner="you")), entry(header(), True, 0, ["a"])])
    assert await store.delete("you", "c")
    await store.commit([entry(header(), False, 1, ["b"], done())])
    (turn,) = (await loaded(store)).turns
    assert (turn.number, turn.text, turn.partial) == (1, "ab", None)
    assert await found(store) == ["a", "b"]
    assert await names(store, "you") == []


async def test_conversations_are_listed_newest_first(store: Store, clock: Clock) -> None:
    for name in ("a", "b", "c"):
        clock.now += 1
        await store.commit([whole(header(name, name, prompt=f"About {name}"))])
    assert await listed(store) == [
        ("c", "About c", 1003.0, 1003.0),
        ("b", "About b", 1002.0, 1002.0),
        ("a", "About a", 1001.0, 1001.0),
    ]


async def test_conversation_is_used_when_turn_begins_or_ends(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("1", "a")), whole(header("2", "b"))])
    clock.now = 1001.0
    await store.commit([entry(header("3", "a"), new=True)])
    assert (await listed(store))[0] == ("a", "Hello?", 1000.0, 1001.0)
    clock.now = 1002.0
    await store.commit([entry(header("3", "a"), False, 0, ["x"])])
    assert (await listed(store))[0] == ("a", "Hello?", 1000.0, 1001.0)
    clock.now = 1003.0
    await store.commit([entry(header("3", "a"), False, 1, [], done())])
    assert (await listed(store))[0] == ("a", "Hello?", 1000.0, 1003.0)
    clock.now = 1004.0
    assert await store.rename("me", "b", "New")
    await store.commit([whole(header("o", None))])
    assert await names(store) == ["a", "b"]


@pytest.mark.parametrize("size", [1, 2, 5, 9, 10])
async def test_pages_of_equal_times_have_no_gap_or_duplicate(
    store: Store, clock: Clock, size: int
) -> None:
    for number in range(9):
        clock.now = 1000.0 + number // 4
        await store.commit([whole(header(f"g{number}", f"c{number}"))])
    await store.commit([whole(header("x", "not mine", owner="you"))])
    seen: list[Summary] = []
    before: int | None = None
    while page := await store.list("me", size, before):
        assert len(page) <= size
        seen += page
        before = page[-1].place
    assert [summary.id for summary in seen] == [f"c{number}" for number in range(8, -1, -1)]
    assert seen == await store.list("me", 100, None)


async def test_conversations_of_one_batch_are_listed_in_batch_order(store: Store) -> None:
    await store.commit([whole(header(name, name)) for name in ("b", "c", "a")])
    assert await names(store) == ["a", "c", "b"]


async def test_list_has_only_conversations_of_owner(store: Store) -> None:
    await store.commit([whole(header("1", "mine")), whole(header("2", "yours", owner="you"))])
    assert await names(store) == ["mine"]
    assert await names(store, "you") == ["yours"]
    assert await names(store, "nobody") == []
    assert await store.list("me", 0, None) == []


async def test_owner_renames_conversation(store: Store) -> None:
    await store.commit([whole(header())])
    before = await store.list("me", 1, None)
    assert await store.rename("me", "c", "Neuer\0 Titel 🎈")
    assert (await loaded(store)).title == "Neuer\0 Titel 🎈"
    (summary,) = await store.list("me", 10, None)
    assert summary == replace(before[0], title="Neuer\0 Titel 🎈")
    assert await store.rename("me", "c", "Neuer\0 Titel 🎈")  # the store has it already
    await store.commit([whole(header("h", prompt="Another?"))])
    assert (await loaded(store)).title == "Neuer\0 Titel 🎈"


async def test_other_owner_cannot_rename_conversation(store: Store) -> None:
    await store.commit([whole(header())])
    assert not await store.rename("you", "c", "Mine")
    assert not await store.rename("me", "unknown", "Mine")
    assert (await loaded(store)).title == "Hello?"


async def test_deleted_conversation_is_gone_with_its_generations(store: Store) -> None:
    await store.commit([whole(header("1")), entry(header("2"), True, 0, ["a"])])
    await store.commit([whole(header("3", "other")), whole(header("4", None))])
    assert await store.delete("me", "c")
    assert await load(store, "c", "me", 10) is None
    assert await names(store) == ["other"]
    assert [await found(store, name) for name in "1234"] == [None, None, ["Hi."], ["Hi."]]
    assert not await store.delete("me", "c")
    assert not await store.rename("me", "c", "Back")


async def test_other_owner_cannot_delete_conversation(store: Store) -> None:
    await store.commit([whole(header())])
    assert not await store.delete("you", "c")
    assert not await store.delete("me", "unknown")
    assert await found(store) == ["Hi."]
    assert await names(store) == ["c"]


async def test_entries_committed_after_delete_are_dropped(store: Store) -> None:
    running = header("running")
    await store.commit([whole(header()), entry(running, True, 0, ["a"])])
    assert await store.delete("me", "c")
    await store.commit(
        [
            entry(running, False, 1, ["b"]),
            whole(header("x", "other")),
            entry(running, False, 2, ["c"], done()),
        ]
    )
    assert await load(store, "c", "me", 10) is None
    assert await found(store, "running") is None
    assert await names(store) == ["other"]  # the rest of the batch is saved


async def test_conversation_id_may_be_reused_after_delete(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("g1")), whole(header("g2"), "old")])
    assert await store.delete("me", "c")
    clock.now = 2000.0
    await store.commit([whole(header("g2", prompt="Anew?"), "new")])
    stored = await loaded(store)
    assert stored.title == "Anew?"
    assert [(turn.number, turn.id, turn.text) for turn in stored.turns] == [(1, "g2", "new")]
    assert await listed(store) == [("c", "Anew?", 2000.0, 2000.0)]


async def test_delete_reveals_older_generation_of_same_id(store: Store) -> None:
    await store.commit([whole(header(conversation="a", began=1.0), "old")])
    await store.commit([whole(header(conversation="b", began=2.0), "new")])
    assert await store.delete("me", "b")
    assert await found(store) == ["old"]
    assert await store.delete("me", "a")
    assert await found(store) is None


async def test_generation_of_dead_process_is_found_and_in_history(
    file: SqliteStore, path: Path
) -> None:
    pieces = ["a", Thinking("b"), "c"]
    await file.commit([entry(header(), True, 0, pieces)])
    for _ in range(2):
        await file.close()
        await file.open()
        stored = await file.find("me", "g")
        assert isinstance(stored, StoredGeneration)
        assert (kinds(heard(stored.pieces)), stored.terminal) == (kinds(pieces), None)
        (turn,) = (await loaded(file)).turns
        assert (turn.text, turn.partial) == ("ac", "interrupted")
    assert query(path, "SELECT * FROM piece") == []


async def test_pieces_committed_with_terminal_are_text_of_turn(store: Store) -> None:
    pieces = [Thinking("hm"), "a", "b"]
    await store.commit([entry(header(), True, 0, pieces, done())])
    (turn,) = (await loaded(store)).turns
    assert turn.text == "ab"
    assert await found(store) == pieces


async def test_purge_deletes_ended_generations_without_conversation(
    store: Store, clock: Clock
) -> None:
    running = header("running", None, began=1.0)
    await store.commit(
        [
            whole(header("old", None)),
            whole(header("yours", None, owner="you")),
            entry(running, True, 0, ["a"]),
            whole(header("in a conversation", "c")),
        ]
    )
    clock.now = 2000.0
    await store.commit([whole(header("in time", None))])
    await store.purge(1000.0)
    assert await found(store, "old") == ["Hi."]
    await store.purge(2000.0)
    assert await found(store, "old") is None
    assert await found(store, "yours", "you") is None
    assert await found(store, "in time") == ["Hi."]
    assert await found(store, "in a conversation") == ["Hi."]
    assert await found(store, "running") == ["a"]
    await store.commit([entry(running, False, 1, ["b"], done())])
    assert await found(store, "running") == ["a", "b"]
    await store.purge(2000.1)
    assert await found(store, "running") is None
    await store.commit([entry(running, False, 1, ["b"], done())])  # a second time, and too late
    assert await found(store, "running") is None


async def test_purge_keeps_conversations(store: Store) -> None:
    await store.commit(
        [
            whole(header("g1"), "a", Thinking("hm"), "b", terminal=done("stopped", "client")),
            entry(header("g2"), True, 0, [Thinking("hm"), "c", "d"]),
            whole(header("g3"), Thinking("hm")),
        ]
    )
    before = await loaded(store)
    assert [turn.text for turn in before.turns] == ["ab", "cd", ""]
    await store.purge(1e12)
    assert await loaded(store) == before
    assert await names(store) == ["c"]


async def test_many_generations_are_purged_in_steps(store: Store) -> None:
    count = 2 * sqlite.PURGED_AT_ONCE + 1
    await store.commit([whole(header(f"g{number}", None)) for number in range(count)])
    for _ in range(3):
        await store.purge(1e12)
    assert [await found(store, f"g{number}") for number in (0, count // 2, count - 1)] == [None] * 3
