"""One contract that every store keeps, and what is SQLite's own."""

# ruff: noqa: ASYNC240 - the files are small, and nothing else is in the way of waiting for them

import asyncio
import contextlib
import gc
import itertools
import os
import random
import re
import sqlite3
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.pieces import Thinking, heard, said
from tests.support.puppet import until
from wsserver import Settings
from wsserver.content import Message, Usage
from wsserver.errors import Code, ConfigError, Refused, StoreError
from wsserver.limits import Memory
from wsserver.prices import Prices, Spent
from wsserver.protocol import Done, Error, Prompt, StoppedBy, Terminal, UsageCounts
from wsserver.stores import MemoryStore, Store, fair, make, sqlite
from wsserver.stores.base import (
    TRACE_KEPT,
    Entry,
    Forgotten,
    Header,
    Held,
    StoredConversation,
    StoredGeneration,
    Summary,
    Unsavable,
    day_of,
    title_of,
)
from wsserver.stores.database import Connection
from wsserver.stores.migrations import MIGRATIONS
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow

SECONDS = 20  # that any wait may take at most
DAY = 86400.0

TOKENS = UsageCounts.of(Usage(input_tokens=3, output_tokens=5))

# All that text can be made of, and what looks like the form in which it is kept.
PIECES: list[str] = [
    "Hello",
    Thinking("hm"),
    Thinking(""),
    "",
    " \t\r\n\v\f\x1c\x85\u2028\u2029",
    "a\0b\0",
    Thinking("\0"),
    "\x01\x1b\x7f\x80",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 é \u202e",
    Thinking("🤔"),
    "\ud7ff\ue000\ufeff\ufffd\uffff\U0010ffff",
    '"\\"\\u0041\\',
    '["thinking"]',
    "['; DROP TABLE piece; --",
    "null",
    "0",
    "long " * 10_000,
]


class Reopened(SqliteStore):
    """Is closed and opened again before whatever it is asked to do."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def _again(self) -> AsyncIterator[None]:
        async with self._turn:
            await self.close()
            await self.open()
            yield

    async def commit(self, entries: Sequence[Entry]) -> None:
        async with self._again():
            await super().commit(entries)

    async def find(self, *args: Any) -> Any:
        async with self._again():
            return await super().find(*args)

    async def load(self, *args: Any, **bounds: Any) -> Any:
        async with self._again():
            return await super().load(*args, **bounds)

    async def list(self, *args: Any) -> Any:
        async with self._again():
            return await super().list(*args)

    async def rename(self, *args: Any) -> bool:
        async with self._again():
            return await super().rename(*args)

    async def delete(self, *args: Any) -> bool:
        async with self._again():
            return await super().delete(*args)

    async def spent(self, *args: Any) -> Spent:
        async with self._again():
            return await super().spent(*args)

    async def purge(self, until: float) -> bool:
        async with self._again():
            return await super().purge(until)

    async def held(self, owner: str) -> Held:
        async with self._again():
            return await super().held(owner)

    async def idle(self, *args: Any) -> Any:
        async with self._again():
            return await super().idle(*args)

    async def probe(self) -> None:
        async with self._again():
            await super().probe()


class Clock:
    """The time of day, which passes only when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


@pytest.fixture(autouse=True)
async def _nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Close what a test that failed has left open, and see that closing ends all threads."""
    before = workers()
    opened: list[SqliteStore] = []
    open_store = SqliteStore.open

    async def noted(store: SqliteStore) -> None:
        opened.append(store)
        await open_store(store)

    monkeypatch.setattr(SqliteStore, "open", noted)
    yield
    for store in opened:
        await store.close()
    for thread in workers() - before:
        thread.join(SECONDS)
        assert not thread.is_alive(), thread


@pytest.fixture(params=["memory", "sqlite", "sqlite, reopened"])
async def store(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Store]:
    kinds: dict[str, Callable[[], Store]] = {
        "memory": MemoryStore,
        "sqlite": lambda: SqliteStore(path),
        "sqlite, reopened": lambda: Reopened(path),
    }
    store = kinds[request.param]()
    await store.open()
    yield store
    await store.close()
    if request.param != "memory":
        check(path)


@pytest.fixture
async def file(path: Path) -> AsyncIterator[SqliteStore]:
    """A store in a file, which does not wait for locks of other programs."""
    store = SqliteStore(path, timeout=0.01)
    await store.open()
    yield store
    await store.close()
    check(path)


def workers() -> set[threading.Thread]:
    """Return the threads of connections; the event loop keeps others of its own."""
    return {thread for thread in threading.enumerate() if "wsserver-store" in thread.name}


def check(path: Path) -> None:
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "PRAGMA foreign_key_check") == []


def query(path: Path, statement: str) -> list[Any]:
    database = sqlite3.connect(path, isolation_level=None, timeout=SECONDS)
    try:
        return database.execute(statement).fetchall()
    finally:
        database.close()


def header(
    name: str = "g",
    conversation: str | None = "c",
    *,
    prompt: str = "Hello?",
    owner: str = "me",
    began: float = 500.0,
) -> Header:
    if conversation is None:
        messages = [Message("user", prompt)]
        return Header(name, owner, None, Prompt(messages=messages), "m", began)
    return Header(name, owner, conversation, Prompt(prompt=prompt), "m", began)


def done(reason: str = "end_turn", by: StoppedBy | None = None) -> Done:
    return Done(id="g", seq=1, reason=reason, by=by, usage=TOKENS)


def failed(code: Code) -> Error:
    return Error(code=code, message="Sorry.", id="g", seq=1, retryable=False, ref="r")


def costing(tokens: int) -> Done:
    usage = UsageCounts.of(Usage(input_tokens=tokens - 1, output_tokens=1))
    return Done(id="g", seq=1, reason="end_turn", usage=usage)


def entry(
    header: Header,
    new: bool = False,
    after: int = 0,
    pieces: Sequence[str] = (),
    terminal: Terminal | None = None,
    *,
    unsaid: bool = False,
) -> Entry:
    return Entry(header, new, after, said(*pieces, block=after), terminal, unsaid)


def whole(header: Header, *pieces: str, terminal: Terminal | None = None) -> Entry:
    return entry(header, True, 0, pieces or ("Hi.",), terminal or done())


def kinds(pieces: Sequence[str]) -> list[tuple[type[str], str]]:
    return [(type(piece), piece) for piece in pieces]


async def tokens_spent(store: Store, owner: str, day: int) -> int:
    return (await store.spent(owner, day)).tokens


async def found(store: Store, name: str = "g", owner: str = "me") -> list[str] | None:
    stored = await store.find(name, owner)
    return heard(stored.pieces) if isinstance(stored, StoredGeneration) else None


async def load(
    store: Store, name: str, owner: str, limit: int, before: int | None = None
) -> StoredConversation | None:
    """Load turns however large they are."""
    return await store.load(name, owner, limit=limit, size=10**9, before=before)


async def loaded(store: Store, name: str = "c", owner: str = "me") -> StoredConversation:
    stored = await load(store, name, owner, 1000)
    assert stored is not None
    return stored


async def listed(store: Store, owner: str = "me") -> list[tuple[str, str, float, float]]:
    return [(s.id, s.title, s.created, s.updated) for s in await store.list(owner, 100, None)]


async def names(store: Store, owner: str = "me") -> list[str]:
    return [summary.id for summary in await store.list(owner, 1000, None)]


# Generations.


async def test_what_was_committed_in_one_batch_is_found(store: Store) -> None:
    asked = header()
    await store.commit([whole(asked, "Hi", " there.")])
    stored = await store.find("g", "me")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == asked
    assert heard(stored.pieces) == ["Hi", " there."]
    assert stored.terminal == done()


async def test_what_was_committed_bit_by_bit_is_found_as_a_whole(store: Store) -> None:
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
        stored = await store.find("g", "me")
        assert isinstance(stored, StoredGeneration)
        assert kinds(heard(stored.pieces)) == kinds(pieces)
        assert stored.terminal == batch.terminal
    (turn,) = (await loaded(store)).turns
    assert turn.text == "acd"


async def test_several_entries_of_one_generation_may_be_in_a_batch(store: Store) -> None:
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


async def test_the_end_may_come_without_a_number_or_pieces(store: Store) -> None:
    await store.commit([entry(header(), True, 0, ["a"])])
    await store.commit([entry(header(), terminal=done())])
    assert await found(store) == ["a"]


async def test_nothing_to_commit_is_no_error(store: Store) -> None:
    await store.commit([])
    assert await names(store) == []


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_pieces_come_back_exactly_and_each_of_its_kind(store: Store, size: int) -> None:
    asked = header()
    await store.commit([entry(asked, new=True)])
    for after in range(0, len(PIECES), size):
        await store.commit([entry(asked, after=after, pieces=PIECES[after : after + size])])
    stored = await found(store)
    assert stored is not None
    assert kinds(stored) == kinds(PIECES)
    (turn,) = (await loaded(store)).turns
    assert turn.text == "".join(piece for piece in PIECES if not isinstance(piece, Thinking))


async def test_a_thousand_pieces_stay_in_order(store: Store) -> None:
    asked = header()
    pieces = [str(number) for number in range(1200)]
    await store.commit([entry(asked, new=True)])
    for after in range(0, 1200, 100):
        await store.commit([entry(asked, after=after, pieces=pieces[after : after + 100])])
    assert await found(store) == pieces


async def test_a_prompt_comes_back_with_all_its_keys(store: Store) -> None:
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
    stored = await store.find("g", "me")
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
            usage=UsageCounts.of(
                Usage(
                    input_tokens=1,
                    output_tokens=2,
                    cache_creation_input_tokens=3,
                    cache_read_input_tokens=10**20,
                    estimated=True,
                )
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
async def test_a_terminal_comes_back_as_it_was(store: Store, terminal: Terminal) -> None:
    await store.commit([whole(header(), terminal=terminal)])
    stored = await store.find("g", "me")
    assert isinstance(stored, StoredGeneration)
    assert stored.terminal == terminal


async def test_to_commit_the_same_again_is_harmless(store: Store) -> None:
    asked, outside = header(), header("o", None)
    first = [entry(asked, True, 0, ["a", "b"]), entry(outside, True, 0, ["x"])]
    then = [entry(asked, False, 2, ["c"], done()), entry(outside, False, 1, ["y"], done())]
    for batch in (first, first, then, then, first, [*first, *then, *first]):
        await store.commit(batch)
    assert await found(store) == ["a", "b", "c"]
    assert await found(store, "o") == ["x", "y"]
    stored = await loaded(store)
    assert [(turn.text, turn.partial) for turn in stored.turns] == [("abc", None)]


async def test_what_failed_to_be_saved_may_come_again_with_more(store: Store) -> None:
    asked = header()
    await store.commit([entry(asked, True, 0, ["a"])])
    await store.commit([entry(asked, True, 0, ["a", "b"])])
    await store.commit([entry(asked, False, 2, ["c"])])
    await store.commit([entry(asked, True, 0, ["a", "b", "c", "d"])])
    await store.commit([entry(asked, False, 1, ["b", "c"])])
    await store.commit([entry(asked, True, 0, ["a"])])
    assert await found(store) == ["a", "b", "c", "d"]


async def test_an_id_that_comes_again_finds_the_latest(store: Store) -> None:
    old, new = header(began=1.0), header(began=2.0, prompt="And now?")
    await store.commit([whole(old, "old")])
    await store.commit([whole(new, "new")])
    assert await found(store) == ["new"]
    await store.commit([whole(old, "old")])  # once more, as nobody knew that it was saved
    assert await found(store) == ["new"]
    assert [turn.text for turn in (await loaded(store)).turns] == ["old", "new"]


async def test_an_older_generation_of_an_id_still_gets_its_end(store: Store) -> None:
    old, new = header(began=1.0), header(began=2.0)
    await store.commit([entry(old, True, 0, ["old"]), entry(new, True, 0, ["new"])])
    await store.commit([entry(old, False, 1, ["er"], done("stopped", "client"))])
    assert await found(store) == ["new"]
    turns = (await loaded(store)).turns
    assert [(turn.text, turn.partial) for turn in turns] == [
        ("older", "client"),
        ("new", "interrupted"),
    ]


async def test_a_generation_of_someone_else_looks_absent(store: Store) -> None:
    await store.commit([whole(header())])
    assert await store.find("g", "you") is None
    assert await store.find("g", "") is None
    assert await store.find("unknown", "me") is None


async def test_an_id_belongs_to_each_owner_alone(store: Store) -> None:
    await store.commit([whole(header(conversation="a"), "mine")])
    await store.commit([whole(header(conversation="b", owner="you"), "yours")])
    assert await found(store) == ["mine"]
    assert await found(store, owner="you") == ["yours"]


async def test_a_generation_that_has_not_ended_is_found(store: Store) -> None:
    await store.commit([entry(header(began=1.0), True, 0, ["a"])])
    stored = await store.find("g", "me")
    assert isinstance(stored, StoredGeneration)
    assert heard(stored.pieces) == ["a"]
    assert stored.terminal is None


async def test_a_generation_outside_of_conversations_is_only_found(store: Store) -> None:
    asked = header(conversation=None)
    await store.commit([whole(asked, "Hi.")])
    stored = await store.find("g", "me")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == asked
    assert heard(stored.pieces) == ["Hi."]
    assert await names(store) == []
    assert await load(store, "c", "me", 10) is None


async def test_what_is_returned_is_the_callers_own(store: Store) -> None:
    said = ["a"]
    await store.commit([entry(header(), True, 0, said)])
    said.append("b")
    first = await found(store)
    assert first is not None
    first.append("c")
    (await loaded(store)).turns.clear()
    assert await found(store) == ["a"]
    assert len((await loaded(store)).turns) == 1


# Traces.


async def trace_of(store: Store, name: str = "g", owner: str = "me") -> float | None:
    """Return when a generation was deleted; None where the store never had it."""
    stored = await store.find(name, owner)
    assert not isinstance(stored, StoredGeneration)
    return None if stored is None else stored.when


async def test_a_generation_is_found_for_as_long_as_it_is_stored(
    store: Store, clock: Clock
) -> None:
    await store.commit([whole(header(), "a", Thinking("b"), "c")])
    clock.now += 365 * DAY
    await store.purge(clock.now)
    stored = await found(store)
    assert stored is not None
    assert kinds(stored) == kinds(["a", Thinking("b"), "c"])


async def test_a_deleted_conversation_leaves_traces_of_its_generations(
    store: Store, clock: Clock
) -> None:
    await store.commit([whole(header("1")), entry(header("2"), True, 0, ["a"])])
    await store.commit([whole(header("1", owner="you"))])
    clock.now = 2000.0
    assert await store.delete("c", "me")
    assert [await trace_of(store, name) for name in "123"] == [2000.0, 2000.0, None]
    assert await found(store, "1", "you") == ["Hi."]
    assert await trace_of(store, "2", "you") is None


async def test_a_purged_generation_leaves_a_trace_until_its_time_is_up(
    store: Store, clock: Clock
) -> None:
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


async def test_an_owner_has_so_many_traces_and_the_oldest_are_dropped_first(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.stores.memory.TRACES", 3)
    monkeypatch.setattr("wsserver.stores.sqlite.TRACES", 3)
    await store.commit([whole(header(f"y{n}", "c", owner="you")) for n in range(2)])
    await store.delete("c", "you")
    for number in range(4):
        clock.now += 1
        await store.commit([whole(header(f"o{number}", None))])
        await store.purge(clock.now + 1)
    assert [await trace_of(store, f"o{n}") is None for n in range(4)] == [True, False, False, False]
    clock.now += 1
    await store.commit([whole(header(f"g{number}")) for number in range(5)])
    await store.delete("c", "me")
    assert [await trace_of(store, f"o{number}") for number in range(4)] == [None] * 4
    assert [await trace_of(store, f"g{number}") for number in range(5)] == [
        None,
        None,
        *[clock.now] * 3,
    ]
    assert [await trace_of(store, f"y{number}", "you") for number in range(2)] == [1000.0] * 2


async def test_an_id_that_was_forgotten_can_come_again(store: Store) -> None:
    await store.commit([whole(header(conversation=None, began=1.0))])
    await store.purge(1e12)
    await store.commit([whole(header(began=2.0), "again")])
    assert await found(store) == ["again"]


# Turns that are not in the history.


async def texts(store: Store) -> list[tuple[int, str]]:
    return [(turn.number, turn.text) for turn in (await loaded(store)).turns]


async def test_a_retry_replaces_the_attempt_in_the_history_and_both_are_found(
    store: Store,
) -> None:
    await store.commit([whole(header("1"), "one")])
    await store.commit([whole(header("2"), "half", terminal=failed(Code.OVERLOADED))])
    retry = replace(header("3"), retry_of="2")
    await store.commit([entry(retry, new=True)])
    assert [name for _, name in await texts(store)] == ["one", ""]
    await store.commit([entry(retry, True, 0, ["whole"], done())])  # as nobody knew of the first
    assert await texts(store) == [(1, "one"), (3, "whole")]
    assert [await found(store, name) for name in "123"] == [["one"], ["half"], ["whole"]]
    stored = await store.find("3", "me")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == retry
    page = await load(store, "c", "me", 1)
    assert page is not None
    assert page.older
    page = await load(store, "c", "me", 10, page.turns[0].number)
    assert page is not None
    assert ([turn.text for turn in page.turns], page.older) == (["one"], False)


@pytest.mark.parametrize("retry_of", ["2", "unknown", "y", "o"])
async def test_a_retry_replaces_its_owners_attempt_in_its_own_conversation_alone(
    store: Store, retry_of: str
) -> None:
    await store.commit(
        [
            whole(header("1"), "one"),
            whole(header("2", "d"), "two"),
            whole(header("y", "c", owner="you"), "yours"),
            whole(header("o", None), "outside"),
        ]
    )
    await store.commit([whole(replace(header("3"), retry_of=retry_of), "three")])
    assert await texts(store) == [(1, "one"), (2, "three")]
    assert [turn.text for turn in (await loaded(store, "d")).turns] == ["two"]
    assert [turn.text for turn in (await loaded(store, "c", "you")).turns] == ["yours"]


async def test_a_prompt_that_was_unsaid_is_in_no_history_and_still_found(store: Store) -> None:
    queued = header("2")
    await store.commit([whole(header("1"), "one"), entry(queued, new=True)])
    await store.commit([whole(header("3"), "three")])
    assert await texts(store) == [(1, "one"), (2, ""), (3, "three")]
    end = done("stopped", "client").model_copy(update={"id": "2", "seq": 0})
    for _ in range(2):
        await store.commit([entry(queued, terminal=end, unsaid=True)])
        assert await texts(store) == [(1, "one"), (3, "three")]
    stored = await store.find("2", "me")
    assert isinstance(stored, StoredGeneration)
    assert (heard(stored.pieces), stored.terminal) == ([], end)
    page = await load(store, "c", "me", 10, 3)
    assert page is not None
    assert ([turn.number for turn in page.turns], page.older) == ([1], False)


async def test_an_attempt_is_back_in_the_history_when_its_retry_was_unsaid(
    store: Store,
) -> None:
    await store.commit([whole(header("1"), "half", terminal=failed(Code.OVERLOADED))])
    retry = replace(header("2"), retry_of="1")
    await store.commit([entry(retry, new=True)])
    assert [number for number, _ in await texts(store)] == [2]
    await store.commit([entry(retry, terminal=done("stopped", "client"), unsaid=True)])
    assert await texts(store) == [(1, "half")]


async def test_a_queued_prompt_whose_process_died_is_interrupted_and_costs_nothing(
    path: Path,
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([entry(header("queued"), new=True), entry(header("o", None), new=True)])
    await store.close()
    await store.open()
    (turn,) = (await loaded(store)).turns
    assert (turn.id, turn.prompt.text, turn.text, turn.partial) == (
        "queued",
        "Hello?",
        "",
        "interrupted",
    )
    assert await tokens_spent(store, "me", day_of(time.time())) == 0
    assert await found(store, "o") == []
    await store.close()


# Conversations.


async def test_turns_come_oldest_first_with_what_was_asked_and_said(store: Store) -> None:
    for number in range(3):
        asked = header(f"g{number}", prompt=f"Question {number}?")
        await store.commit([whole(asked, Thinking("hm"), f"Answer {number}", ".")])
    stored = await loaded(store)
    assert (stored.id, stored.owner, stored.title) == ("c", "me", "Question 0?")
    assert [(turn.id, turn.prompt.text, turn.text, turn.partial) for turn in stored.turns] == [
        (f"g{number}", f"Question {number}?", f"Answer {number}.", None) for number in range(3)
    ]
    assert [turn.number for turn in stored.turns] == [1, 2, 3]


async def test_a_conversation_that_is_unknown_is_none(store: Store) -> None:
    assert await load(store, "c", "me", 10) is None
    assert await load(store, "c", "me", 10, 5) is None


async def test_the_newest_turns_are_loaded_up_to_the_limit(store: Store) -> None:
    await store.commit([whole(header(f"g{number}")) for number in range(5)])
    for limit, expected in [(0, ""), (1, "4"), (3, "234"), (5, "01234"), (100, "01234")]:
        stored = await load(store, "c", "me", limit)
        assert stored is not None
        assert "".join(turn.id for turn in stored.turns) == "".join(f"g{n}" for n in expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
async def test_the_whole_history_can_be_paged_through(store: Store, size: int) -> None:
    # What is said elsewhere meanwhile leaves no gaps, by which one could tell how much that is.
    await store.commit(
        [
            batch
            for number in range(7)
            for batch in (
                whole(header(f"x{number}", "other")),
                whole(header(f"o{number}", None)),
                whole(header(f"g{number}", owner="you")),
                entry(header(f"g{number}"), True, 0, ["a"]),
                entry(header(f"g{number}"), False, 1, ["b", str(number)]),
            )
        ]
    )
    pages: list[list[tuple[str, str]]] = []
    numbers: list[int] = []
    before: int | None = None
    while (stored := await load(store, "c", "me", size, before)) is not None and stored.turns:
        pages.insert(0, [(turn.id, turn.text) for turn in stored.turns])
        numbers = [turn.number for turn in stored.turns] + numbers
        before = stored.turns[0].number
    assert list(itertools.chain(*pages)) == [(f"g{n}", f"ab{n}") for n in range(7)]
    assert all(len(page) == size for page in pages[1:])
    assert numbers == [1, 2, 3, 4, 5, 6, 7]


async def test_turns_are_read_newest_first_until_their_bytes_reach_a_bound(store: Store) -> None:
    sizes = [10, 1000, 20, 30, 40]
    for number, size in enumerate(sizes, start=1):
        prompt = "é" * (size // 4)  # of two bytes each
        await store.commit(
            [
                whole(
                    header(f"g{number}", prompt=prompt),
                    Thinking("x" * (size // 4)),
                    "x" * (size // 4),
                )
            ]
        )

    async def read(size: int, before: int | None = None) -> tuple[list[int], bool]:
        stored = await store.load("c", "me", limit=100, size=size, before=before)
        assert stored is not None
        return [turn.number for turn in stored.turns], stored.older

    # A prompt counts with the keys of its record, which not every store has.
    assert await read(1) == ([5], True)
    assert await read(10, 3) == ([2], True)
    assert await read(10, 2) == ([1], False)
    assert await read(900) == ([3, 4, 5], True)
    assert await read(100_000) == ([1, 2, 3, 4, 5], False)
    assert await read(0, 1) == ([], False)


async def test_a_history_tells_whether_there_are_older_turns(store: Store) -> None:
    await store.commit([whole(header(f"g{number}")) for number in range(3)])
    for limit, before, older in [(3, None, False), (2, None, True), (2, 3, False), (1, 2, False)]:
        stored = await load(store, "c", "me", limit, before)
        assert stored is not None
        assert stored.older is older


@pytest.mark.parametrize("before", [0, 1, -1, -(10**30)])
async def test_before_the_first_turn_there_are_none(store: Store, before: int) -> None:
    await store.commit([whole(header("g1")), whole(header("g2"))])
    stored = await load(store, "c", "me", 10, before)
    assert stored is not None
    assert stored.turns == []
    assert stored.title == "Hello?"


@pytest.mark.parametrize("before", [1000, 2**63 - 1, 2**63, 10**30])
async def test_before_any_later_number_there_are_all_turns(store: Store, before: int) -> None:
    await store.commit([whole(header("g1")), whole(header("g2"))])
    stored = await load(store, "c", "me", 10, before)
    assert stored is not None
    assert [turn.id for turn in stored.turns] == ["g1", "g2"]


@pytest.mark.parametrize(
    ("terminal", "why"),
    [
        (done(), None),
        (done("max_tokens"), None),
        (done("stopped", "client"), "client"),
        (done("stopped", "disconnect"), "disconnect"),
        (failed(Code.OVERLOADED), "overloaded"),
        (failed(Code.REFUSAL), "refusal"),
        (None, "interrupted"),
    ],
)
async def test_a_turn_says_why_it_is_not_whole(
    store: Store, terminal: Terminal | None, why: str | None
) -> None:
    await store.commit([entry(header(), True, 0, ["Hi"], terminal)])
    (turn,) = (await loaded(store)).turns
    assert turn.partial == why
    assert type(turn.partial) in {str, type(None)}
    assert turn.text == "Hi"


async def test_a_turn_in_which_nothing_was_said_has_no_text(store: Store) -> None:
    await store.commit([entry(header(), new=True), whole(header("h"), Thinking("hm"))])
    assert [turn.text for turn in (await loaded(store)).turns] == ["", ""]


async def test_a_conversation_of_someone_else_looks_absent(store: Store) -> None:
    await store.commit([whole(header())])
    assert await load(store, "c", "you", 10) is None
    assert await load(store, "c", "", 10, 5) is None
    assert await names(store, "you") == []


async def test_two_owners_may_have_a_conversation_of_the_same_id(
    store: Store, clock: Clock
) -> None:
    await store.commit([whole(header("1", prompt="Mine?"), "a")])
    clock.now = 2000.0
    await store.commit(  # of the same id and even of the same moment, and in turns
        [
            whole(header("1", prompt="Yours?", owner="you"), "b"),
            whole(header("2"), "c"),
            whole(header("2", owner="you"), "d"),
            whole(header("3", owner="you"), "e"),
        ]
    )
    mine, yours = await loaded(store), await loaded(store, owner="you")
    assert (mine.owner, mine.title) == ("me", "Mine?")
    assert (yours.owner, yours.title) == ("you", "Yours?")
    assert [(t.number, t.id, t.text) for t in mine.turns] == [(1, "1", "a"), (2, "2", "c")]
    assert [(t.number, t.id, t.text) for t in yours.turns] == [
        (1, "1", "b"),
        (2, "2", "d"),
        (3, "3", "e"),
    ]
    page = await load(store, "c", "you", 10, 3)
    assert page is not None
    assert [turn.text for turn in page.turns] == ["b", "d"]
    assert (await found(store, "1"), await found(store, "1", "you")) == (["a"], ["b"])
    assert await listed(store) == [("c", "Mine?", 1000.0, 2000.0)]
    assert await listed(store, "you") == [("c", "Yours?", 2000.0, 2000.0)]


async def test_what_one_owner_does_the_other_of_the_same_id_does_not_notice(
    store: Store, clock: Clock
) -> None:
    running = header("running")
    await store.commit([whole(header("1")), entry(running, True, 0, ["a"])])
    await store.commit([whole(header("1", owner="you")), whole(header("2", owner="you"))])
    yours, listed = await loaded(store, owner="you"), await store.list("you", 10, None)

    async def unchanged() -> bool:
        return (await loaded(store, owner="you"), await store.list("you", 10, None)) == (
            yours,
            listed,
        )

    clock.now = 2000.0
    await store.commit([whole(header("2"))])
    assert await store.rename("c", "me", "New")
    assert (await loaded(store)).title == "New"
    assert await unchanged()
    await store.purge(1e12)
    assert await unchanged()
    assert await store.delete("c", "me")
    assert await load(store, "c", "me", 10) is None
    assert not await store.rename("c", "me", "Back")
    assert not await store.delete("c", "me")
    assert (await found(store, "1"), await found(store, "1", "you")) == (None, ["Hi."])
    await store.commit([entry(running, False, 1, ["b"], done())])  # too late
    assert await names(store) == []
    assert await unchanged()
    await store.commit([whole(header("3", prompt="Anew?"), "c")])
    anew = await loaded(store)
    assert (anew.title, [(turn.number, turn.text) for turn in anew.turns]) == ("Anew?", [(1, "c")])
    assert await unchanged()


# Opened again, a store takes what has not ended for dead.
@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
async def test_a_reply_goes_on_after_the_other_owner_of_the_same_id_deleted_theirs(
    store: Store,
) -> None:
    await store.commit([whole(header(owner="you")), entry(header(), True, 0, ["a"])])
    assert await store.delete("c", "you")
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


async def test_a_conversation_is_newer_when_a_turn_begins_or_ends_and_not_in_between(
    store: Store, clock: Clock
) -> None:
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
    assert await store.rename("b", "me", "New")
    await store.commit([whole(header("o", None))])
    assert await names(store) == ["a", "b"]


@pytest.mark.parametrize("size", [1, 2, 5, 9, 10])
async def test_a_list_is_paged_without_gap_or_duplicate_where_times_are_equal(
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


async def test_conversations_of_one_batch_are_listed_in_its_order(store: Store) -> None:
    await store.commit([whole(header(name, name)) for name in ("b", "c", "a")])
    assert await names(store) == ["a", "c", "b"]


async def test_a_list_has_the_owners_own_alone(store: Store) -> None:
    await store.commit([whole(header("1", "mine")), whole(header("2", "yours", owner="you"))])
    assert await names(store) == ["mine"]
    assert await names(store, "you") == ["yours"]
    assert await names(store, "nobody") == []
    assert await store.list("me", 0, None) == []


async def test_a_conversation_is_renamed_by_its_owner(store: Store) -> None:
    await store.commit([whole(header())])
    before = await store.list("me", 1, None)
    assert await store.rename("c", "me", "Neuer\0 Titel 🎈")
    assert (await loaded(store)).title == "Neuer\0 Titel 🎈"
    (summary,) = await store.list("me", 10, None)
    assert summary == replace(before[0], title="Neuer\0 Titel 🎈")
    assert await store.rename("c", "me", "Neuer\0 Titel 🎈")  # that it has already
    await store.commit([whole(header("h", prompt="Another?"))])
    assert (await loaded(store)).title == "Neuer\0 Titel 🎈"


async def test_nobody_else_renames_a_conversation(store: Store) -> None:
    await store.commit([whole(header())])
    assert not await store.rename("c", "you", "Mine")
    assert not await store.rename("unknown", "me", "Mine")
    assert (await loaded(store)).title == "Hello?"


async def test_a_deleted_conversation_is_gone_with_all_in_it(store: Store) -> None:
    await store.commit([whole(header("1")), entry(header("2"), True, 0, ["a"])])
    await store.commit([whole(header("3", "other")), whole(header("4", None))])
    assert await store.delete("c", "me")
    assert await load(store, "c", "me", 10) is None
    assert await names(store) == ["other"]
    assert [await found(store, name) for name in "1234"] == [None, None, ["Hi."], ["Hi."]]
    assert not await store.delete("c", "me")
    assert not await store.rename("c", "me", "Back")


async def test_nobody_else_deletes_a_conversation(store: Store) -> None:
    await store.commit([whole(header())])
    assert not await store.delete("c", "you")
    assert not await store.delete("unknown", "me")
    assert await found(store) == ["Hi."]
    assert await names(store) == ["c"]


async def test_what_is_committed_after_a_delete_is_dropped(store: Store) -> None:
    running = header("running")
    await store.commit([whole(header()), entry(running, True, 0, ["a"])])
    assert await store.delete("c", "me")
    await store.commit(
        [
            entry(running, False, 1, ["b"]),
            whole(header("x", "other")),
            entry(running, False, 2, ["c"], done()),
        ]
    )
    assert await load(store, "c", "me", 10) is None
    assert await found(store, "running") is None
    assert await names(store) == ["other"]  # what else was in that batch is saved


async def test_a_name_can_be_used_anew_after_a_delete(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("g1")), whole(header("g2"), "old")])
    assert await store.delete("c", "me")
    clock.now = 2000.0
    await store.commit([whole(header("g2", prompt="Anew?"), "new")])
    stored = await loaded(store)
    assert stored.title == "Anew?"
    assert [(turn.number, turn.id, turn.text) for turn in stored.turns] == [(1, "g2", "new")]
    assert await listed(store) == [("c", "Anew?", 2000.0, 2000.0)]


async def test_a_delete_uncovers_an_older_generation_of_the_id(store: Store) -> None:
    await store.commit([whole(header(conversation="a", began=1.0), "old")])
    await store.commit([whole(header(conversation="b", began=2.0), "new")])
    assert await store.delete("b", "me")
    assert await found(store) == ["old"]
    assert await store.delete("a", "me")
    assert await found(store) is None


async def test_one_that_died_with_its_process_is_found_and_is_in_the_history(
    file: SqliteStore, path: Path
) -> None:
    pieces = ["a", Thinking("b"), "c"]
    await file.commit([entry(header(), True, 0, pieces)])
    for _ in range(2):
        await file.close()
        await file.open()
        stored = await file.find("g", "me")
        assert isinstance(stored, StoredGeneration)
        assert (kinds(heard(stored.pieces)), stored.terminal) == (kinds(pieces), None)
        (turn,) = (await loaded(file)).turns
        assert (turn.text, turn.partial) == ("ac", "interrupted")
    assert query(path, "SELECT * FROM piece") == []


async def test_the_text_that_comes_with_an_end_is_that_of_the_turn(store: Store) -> None:
    pieces = [Thinking("hm"), "a", "b"]
    await store.commit([entry(header(), True, 0, pieces, done())])
    (turn,) = (await loaded(store)).turns
    assert turn.text == "ab"
    assert await found(store) == pieces


async def test_a_purge_takes_generations_outside_of_conversations_that_ended_before_a_time(
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
    await store.commit([entry(running, False, 1, ["b"], done())])  # once more, and too late
    assert await found(store, "running") is None


@pytest.mark.usefixtures("clock")
async def test_money_is_counted_by_the_price_of_the_model(store: Store) -> None:
    usage = UsageCounts.of(Usage(100, 10, 1000, 10_000))
    for name, model in (("1", "claude-sonnet-4-6"), ("2", "claude-opus-5"), ("3", "demo")):
        terminal = done().model_copy(update={"usage": usage})
        await store.commit([whole(replace(header(name), model=model), terminal=terminal)])
    tokens = 100 + 10 + 1250 + 1000
    sonnet = 100 * 3 + 10 * 15 + 1000 * 3.75 + 10_000 * 0.3
    opus = 100 * 5 + 10 * 25 + 1000 * 6.25 + 10_000 * 0.5
    assert await store.spent("me", 0) == Spent(3 * tokens, int(sonnet + opus))


async def test_a_purge_takes_nothing_from_a_conversation(store: Store) -> None:
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


async def test_many_generations_are_purged_by_and_by(store: Store) -> None:
    count = 2 * sqlite.PURGED_AT_ONCE + 1
    await store.commit([whole(header(f"g{number}", None)) for number in range(count)])
    for _ in range(3):
        await store.purge(1e12)
    assert [await found(store, f"g{number}") for number in (0, count // 2, count - 1)] == [None] * 3


# How much there is, and the clock.


async def test_an_owner_is_told_what_they_have_in_the_store(store: Store) -> None:
    assert await store.held("me") == Held(0, 0)
    await store.commit([whole(header("1"), "x" * 10_000), whole(header("2"), Thinking("é" * 1000))])
    first = await store.held("me")
    assert 12_000 < first.bytes < 17_000
    assert first.conversations == 1
    await store.commit(
        [
            whole(header("3", "d"), "x" * 1000),
            whole(header("4", None), "x" * 5000),
            whole(header("1", owner="you"), "x"),
        ]
    )
    held = await store.held("me")
    assert first.bytes + 6000 < held.bytes < first.bytes + 11_000
    assert held.conversations == 2
    assert (await store.held("you")).conversations == 1
    await store.commit([whole(header("1"), "x" * 10_000)])  # once more
    assert await store.held("me") == held
    await store.delete("c", "me")
    await store.purge(1e12)
    left = await store.held("me")
    assert 1000 < left.bytes < 4000
    assert left.conversations == 1
    await store.delete("d", "me")
    assert await store.held("me") == Held(0, 0)


async def test_the_conversation_used_last_is_first_though_the_clock_was_set_back(
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


async def test_conversations_that_were_not_used_for_long_are_told(
    store: Store, clock: Clock
) -> None:
    for name in "abc":
        await store.commit([whole(header(name, name, owner=f"of {name}"))])
        clock.now += 10
    await store.commit([whole(header("a2", "a", owner="of a"))])
    assert await store.idle(1000.0, 10) == []
    assert await store.idle(1025.0, 10) == [("of b", "b"), ("of c", "c")]
    assert await store.idle(1025.0, 1) == [("of b", "b")]
    assert {owner for owner, _ in await store.idle(1e9, 10)} == {"of a", "of b", "of c"}


async def test_a_probe_changes_nothing(store: Store) -> None:
    await store.commit([whole(header())])
    await store.probe()
    assert await found(store) == ["Hi."]


# Tokens.


@pytest.mark.parametrize(
    ("seconds", "day"),
    [(0.0, 0), (DAY - 0.1, 0), (DAY, 1), (-0.1, -1), (1_700_000_000.5, 19675)],
)
def test_a_day_is_one_in_utc(seconds: float, day: int) -> None:
    assert day_of(seconds) == day
    assert type(day_of(seconds)) is int


async def test_tokens_are_counted_for_each_owner_and_the_day_of_the_end(
    store: Store, clock: Clock
) -> None:
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


# Opened again, a store takes what has not ended for dead; see below.
@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
async def test_a_reply_is_counted_when_it_ends_and_not_before(store: Store, clock: Clock) -> None:
    await store.commit([entry(header(), True, 0, ["a"])])
    await store.commit([entry(header(), False, 1, ["b"])])
    assert await tokens_spent(store, "me", 0) == 0
    clock.now = DAY
    await store.commit([entry(header(), False, 2, ["c"], costing(10))])
    assert [await tokens_spent(store, "me", day) for day in (0, 1)] == [0, 10]


@pytest.mark.parametrize("conversation", ["c", None])
async def test_what_is_committed_again_is_counted_once(
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
async def test_to_delete_a_conversation_gives_no_tokens_back(
    store: Store, clock: Clock, repeated: Entry
) -> None:
    await store.commit([whole(header()), whole(header("h"))])
    assert await tokens_spent(store, "me", 0) == 16
    assert await store.delete("c", "me")
    assert await tokens_spent(store, "me", 0) == 16
    await store.commit([repeated])  # as nobody knew that it was saved
    assert await tokens_spent(store, "me", 0) == 16


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
async def test_a_reply_that_ends_after_its_conversation_was_deleted_is_counted(
    store: Store, clock: Clock
) -> None:
    await store.commit([entry(header(), True, 0, ["a"])])
    assert await store.delete("c", "me")
    for _ in range(2):
        await store.commit([entry(header(), False, 1, ["b"], done())])
        assert await tokens_spent(store, "me", 0) == 8
    assert await names(store) == []


async def test_a_purge_gives_no_tokens_back(store: Store, clock: Clock) -> None:
    asked = header(conversation=None)
    await store.commit([whole(asked), whole(header("h"))])
    await store.purge(1e12)
    assert await found(store) is None
    await store.commit([entry(asked, False, 1, [], done())])
    assert await tokens_spent(store, "me", 0) == 16


async def test_a_purge_keeps_the_accounts_of_the_last_days(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("1"))])
    clock.now = DAY
    await store.purge(1e12)
    assert await tokens_spent(store, "me", 0) == 8
    clock.now = 91 * DAY
    await store.commit([whole(header("2"))])
    await store.purge(0.0)
    assert [await tokens_spent(store, "me", day) for day in (0, 91)] == [0, 8]


async def test_what_costs_more_than_can_be_is_counted_as_far_as_can_be(
    store: Store, clock: Clock
) -> None:
    huge = Usage(input_tokens=10**30, cache_read_input_tokens=10**30)
    terminal = done().model_copy(update={"usage": UsageCounts.of(huge)})
    await store.commit([whole(header(str(number)), terminal=terminal) for number in range(3)])
    assert await tokens_spent(store, "me", 0) == 3 * 10**12


async def test_commits_and_reads_at_the_same_time_do_not_mix(store: Store) -> None:
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


async def test_a_store_can_be_closed_twice(store: Store) -> None:
    await store.close()
    await store.close()


# Titles.


@pytest.mark.parametrize(
    ("prompt", "title"),
    [
        ("Hello?", "Hello?"),
        ("  Hello,\n\n\tworld \r\n", "Hello, world"),
        ("one\u2028two\u00a0three\u3000four\x85five", "one two three four five"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("字" * 500, "字" * 59 + "…"),
        ("a " * 30, "a " * 29 + "a"),
        ("word " * 12 + "word", "word " * 11 + "word…"),
        ("word " * 1000, "word " * 11 + "word…"),
        ("x" * 59 + " y", "x" * 59 + "…"),
        ("See " + "https://example.org/" * 10, ("See " + "https://example.org/" * 3)[:59] + "…"),
        ("🎈" * 100, "🎈" * 59 + "…"),
        (".\n" * 3, ". . ."),
    ],
)
def test_a_title_is_the_prompt_on_one_line_of_sixty_characters(prompt: str, title: str) -> None:
    assert title_of(Prompt(prompt=prompt)) == title
    assert 0 < len(title) <= 60


async def test_a_conversation_is_named_after_its_first_prompt(store: Store) -> None:
    await store.commit([whole(header(prompt="Tell me of\n\n" + "字" * 500))])
    await store.commit([whole(header("h", prompt="Another?"))])
    title = "Tell me of " + "字" * 48 + "…"
    assert (await loaded(store)).title == title
    assert [summary.title for summary in await store.list("me", 1, None)] == [title]


def test_a_history_that_the_client_keeps_has_no_title() -> None:
    assert title_of(Prompt(messages=[Message("user", "Hi")])) == ""


# The store in memory.


async def test_memory_drops_the_conversation_that_was_idle_for_longest() -> None:
    store = MemoryStore(2)
    await store.commit([whole(header("1", "a")), whole(header("2", "b"))])
    await store.commit([entry(header("3", "a"), True, 0, ["x"])])
    await store.commit([whole(header("4", None))])  # is in no conversation, and counts as none
    await store.commit([whole(header("5", "c"))])
    assert sorted(await names(store)) == ["a", "c"]
    assert await found(store, "2") is None
    await store.commit([entry(header("3", "a"), False, 1, ["y"])])  # is not idle either
    await store.commit([whole(header("6", "d"))])
    assert sorted(await names(store)) == ["a", "d"]
    assert await found(store, "3") == ["x", "y"]
    assert await found(store, "4") == ["Hi."]


async def test_memory_drops_a_conversation_and_not_another_owners_of_the_same_id() -> None:
    store = MemoryStore(2)
    await store.commit([whole(header()), whole(header(owner="you")), whole(header("h", "d"))])
    assert await names(store) == ["d"]
    assert await names(store, "you") == ["c"]
    assert (await found(store), await found(store, owner="you")) == (None, ["Hi."])


async def test_memory_drops_what_is_said_in_a_conversation_that_it_dropped() -> None:
    store = MemoryStore(1)
    await store.commit([entry(header("1", "a"), new=True), entry(header("2", "b"), new=True)])
    await store.commit([entry(header("1", "a"), False, 0, ["x"], done())])
    assert await names(store) == ["b"]
    assert await found(store, "1") is None


async def test_memory_counts_for_today_and_yesterday(clock: Clock) -> None:
    store = MemoryStore(1)
    for day in range(5):
        clock.now = day * DAY
        await store.commit([whole(header(f"{day} {name}", name)) for name in "ab"])
        await store.purge(0.0)
        assert await tokens_spent(store, "me", day) == 16
    assert [await tokens_spent(store, "me", day) for day in range(6)] == [0, 0, 0, 16, 16, 0]
    assert sorted(store._spent) == [3, 4]


async def test_memory_drops_by_bytes_what_is_cheapest_to_lose_first() -> None:
    store = MemoryStore(memory=Memory(100_000))
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
    assert isinstance(await store.find("a", "me"), Forgotten)
    assert store._size < 100_000
    await store.delete("a", "me")
    assert (store._size, store._sizes) == (0, {})


async def test_memory_counts_what_it_holds_as_it_is() -> None:
    store = MemoryStore()
    chance = random.Random(3)
    for text in ("plain " * 200, "é" * 800, "漢" * 700, "🎈" * 600, "x🎈" * 500):
        await store.commit([whole(header("warm", "warm"), "x")])
        tracemalloc.start()
        before, counted = tracemalloc.get_traced_memory()[0], store._size
        for number in range(300):
            name = f"{text[0]}{number}"
            pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
            batch = whole(header(name, f"c{chance.randrange(20)}", prompt=text), *pieces)
            await store.commit([batch])
            del batch, pieces
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert 0.8 < (store._size - counted) / held < 1.3, (text[:2], store._size - counted, held)


async def test_memory_lists_a_page_without_looking_at_the_other_conversations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    await store.commit([whole(header(f"g{n}", f"c{n}")) for n in range(5000)])
    looked_at = 0

    class Place:
        def __call__(self, conversation: Any) -> int:
            nonlocal looked_at
            looked_at += 1
            place: int = conversation.place
            return place

    monkeypatch.setattr("wsserver.stores.memory._place", Place())
    page = await store.list("me", 20, None)
    assert [summary.id for summary in page] == [f"c{n}" for n in range(4999, 4979, -1)]
    page = await store.list("me", 20, page[-1].place)
    assert page[0].id == "c4979"
    await store.commit([whole(header("again", "c7"))])
    assert looked_at < 50


async def test_memory_purges_in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.stores.memory.PURGED_AT_ONCE", 2)
    store = MemoryStore()
    await store.commit([whole(header(f"g{n}", None)) for n in range(5)])
    await store.commit([whole(header(f"h{n}")) for n in range(5)])
    left = []
    while await store.purge(1e12):
        left.append(len(store._generations))
    assert (left, len(store._generations)) == ([8, 6], 5)


async def test_memory_has_so_many_traces_of_all_owners(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert len(store._traced) == 3


# Which store.


async def test_the_settings_name_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert isinstance(make(Settings(store="memory:"), Memory(10**9)), MemoryStore)
    for url, path in [
        ("sqlite:///some/where.db", tmp_path / "some/where.db"),
        (f"sqlite:///{tmp_path}/absolute.db", tmp_path / "absolute.db"),
        ("sqlite:///~/chat.db", tmp_path / "home/chat.db"),
        ("sqlite:///what?mode=memory", tmp_path / "what?mode=memory"),
    ]:
        store = make(Settings(store=url), Memory(10**9))
        await store.open()
        await store.close()
        assert path.is_file(), url
    limited = make(Settings(conversations=1), Memory(10**9))
    await limited.commit([whole(header("1", "a")), whole(header("2", "b"))])
    assert await names(limited) == ["b"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory://",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://host/file.db",
        "sqlite:///~nobody-of-this-name/chat.db",
        "sqlite:///a\0b",
        "postgres://host/db",
    ],
)
def test_a_store_that_is_unknown_is_one_clear_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^store: ") as raised:
        make(Settings(store=url), Memory(10**9))
    assert "\n" not in str(raised.value)
    assert repr(url) in str(raised.value)


# SQLite: the file.


async def refused(store: SqliteStore) -> str:
    """Open a store that cannot be opened, and return why."""
    try:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(ConfigError, match=r"^store: ") as raised:
                await store.open()
    finally:
        await store.close()
    assert "\n" not in str(raised.value)
    return str(raised.value)


async def test_the_file_is_set_up_for_readers_beside_a_writer(
    file: SqliteStore, path: Path
) -> None:
    assert query(path, "PRAGMA journal_mode") == [("wal",)]
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    for connection in (file._writer, file._reader):
        assert await ask(connection, "PRAGMA foreign_keys") == [(1,)]
        assert await ask(connection, "PRAGMA synchronous") == [(1,)]
        assert await ask(connection, "PRAGMA busy_timeout") == [(10,)]


async def test_one_file_remains_once_it_is_closed_beside_the_lock(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    await store.close()
    assert {found.name for found in path.parent.iterdir()} == {"chat.db", "chat.db.lock"}


async def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "chat.db"
    store = SqliteStore(path)
    await store.open()
    await store.close()
    check(path)


async def test_an_empty_file_is_migrated(path: Path) -> None:
    path.touch()
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    assert await found(store) == ["Hi."]
    await store.close()


async def test_a_file_of_an_older_version_is_migrated_and_keeps_what_it_has(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    await store.close()
    script = "CREATE TABLE later (x); CREATE INDEX later_by_x ON later (x);"
    monkeypatch.setattr(sqlite, "MIGRATIONS", [*MIGRATIONS, script, "DROP TABLE later;"])
    await store.open()
    assert await found(store) == ["Hi."]
    await store.close()
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS) + 2,)]
    assert query(path, "SELECT * FROM sqlite_master WHERE name LIKE 'later%'") == []


async def test_a_file_from_before_tokens_were_counted_is_migrated(path: Path, clock: Clock) -> None:
    prompt, end = '{"prompt": "Hello?"}', done().model_dump_json(exclude_none=True)
    for statement in [
        *MIGRATIONS[0].split(";"),
        "INSERT INTO conversation VALUES ('c', 'me', 'Hello?', 1.0, 2.0)",
        f"INSERT INTO generation VALUES (1, 'g', 1, 2, 'me', 'c', '{prompt}', 'm', '{end}', 'Hi.')",
        f"INSERT INTO generation VALUES (2, 'h', 2, NULL, 'me', 'c', '{prompt}', 'm', NULL, NULL)",
        "INSERT INTO piece VALUES (1, 0, '[\"Hi.\"]'), (2, 0, '[\"Hello\"]')",
        "PRAGMA user_version = 1",
    ]:
        query(path, statement)
    store = SqliteStore(path)
    await store.open()
    assert [(turn.text, turn.partial) for turn in (await loaded(store)).turns] == [
        ("Hi.", None),
        ("Hello", "interrupted"),
    ]
    assert await tokens_spent(store, "me", 0) == 2  # of the one that died
    await store.commit([whole(header("i"))])
    assert await tokens_spent(store, "me", 0) == 10
    await store.close()
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    check(path)


async def test_a_file_from_before_ids_were_their_owners_is_migrated(
    path: Path, clock: Clock
) -> None:
    prompt, end = '{"prompt": "Hello?"}', done().model_dump_json(exclude_none=True)
    database = sqlite3.connect(path)
    database.executescript("".join(MIGRATIONS[:2]))
    database.executemany(
        "INSERT INTO conversation (id, owner, title, created, updated) VALUES (?, ?, ?, ?, ?)",
        [("c", "me", "First", 1.0, 9.0), ("d", "you", "Second", 2.0, 4.0)],
    )
    rows = [  # the last one was said by somebody else than the conversation was of
        ("g1", "me", "c", end, 2.0),
        ("g1", "you", "d", end, 4.0),
        ("o", "me", None, end, 5.0),
        ("g2", "me", "c", None, None),
        ("g2", "you", "c", end, 7.0),
    ]
    database.executemany(
        "INSERT INTO generation (number, id, began, ended, owner, conversation, prompt, model, "
        "terminal, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (10 * n, name, float(n), ended, owner, conversation, prompt, "m", terminal, None)
            for n, (name, owner, conversation, terminal, ended) in enumerate(rows, start=1)
        ],
    )
    database.executemany(
        "INSERT INTO piece VALUES (?, ?, ?)",
        [(10 * n, after, f'["{n}", ["t"]]') for n in range(1, 6) for after in (0, 2)],
    )
    database.execute("INSERT INTO counted VALUES ('me', 'g1', 1.0, 0, 8)")
    database.execute("PRAGMA user_version = 2")
    database.commit()
    database.close()

    store = SqliteStore(path)
    await store.open()
    assert await ask(store._writer, "PRAGMA foreign_keys") == [(1,)]
    assert await listed(store) == [("c", "First", 1.0, 9.0)]
    assert await listed(store, "you") == [
        ("c", "…", 5.0, 7.0),
        ("d", "Second", 2.0, 4.0),
    ]
    assert [
        [(t.number, t.id, t.prompt.text, t.text, t.partial) for t in stored.turns]
        for stored in (
            await loaded(store),
            await loaded(store, "d", "you"),
            await loaded(store, "c", "you"),
        )
    ] == [
        [(1, "g1", "Hello?", "11", None), (2, "g2", "Hello?", "44", "interrupted")],
        [(1, "g1", "Hello?", "22", None)],
        [(1, "g2", "Hello?", "55", None)],
    ]
    outside = await store.find("o", "me")
    assert isinstance(outside, StoredGeneration)
    assert outside.header.conversation is None
    assert (outside.terminal, kinds(heard(outside.pieces))) == (
        done().model_copy(update={"id": "o"}),
        kinds(["3", Thinking("t"), "3", Thinking("t")]),
    )
    assert await found(store, "g1", "you") == ["2", "t", "2", "t"]
    assert await tokens_spent(store, "me", 0) == 8 + 2  # and what was said by the one that died

    await store.commit([whole(header("g3"), "new")])
    assert [turn.number for turn in (await loaded(store)).turns] == [1, 2, 3]
    assert await store.delete("c", "me")
    assert query(path, "SELECT DISTINCT generation FROM piece") == [(20,), (30,), (50,)]
    assert len((await loaded(store, "c", "you")).turns) == 1
    await store.close()
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    check(path)

    # It is as if it had always been of this version.
    new = path.with_name("new.db")
    store = SqliteStore(new)
    await store.open()
    await store.close()
    tables = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    assert query(path, tables) == query(new, tables)


async def test_nothing_looks_at_all_that_there_is(file: SqliteStore, path: Path) -> None:
    statements = await trace(file._writer)
    await trace(file._reader, statements)
    await file.commit([whole(header()), whole(header("o", None))])
    await loaded(file)
    await found(file)
    await file.list("me", 10, 9)
    await file.rename("c", "me", "New")
    await file.delete("c", "me")
    await file.purge(1e12)
    await file.spent("me", 0)
    asked = [statement for statement in statements if re.match("SELECT|INSERT|UPD|DEL", statement)]
    assert len(asked) > 15
    for statement in asked:
        for step in query(path, f"EXPLAIN QUERY PLAN {statement}"):
            assert not re.match("SCAN (TABLE )?[a-z]", step[-1]), (statement, step)


async def test_a_migration_that_fails_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(path)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "MIGRATIONS", [*MIGRATIONS, "CREATE TABLE generation (x);"])
        assert "already exists" in await refused(store)
    assert query(path, "SELECT * FROM sqlite_master") == []
    await store.open()
    await store.close()


async def test_a_file_of_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    query(path, "PRAGMA user_version = 99")
    before = path.read_bytes()
    message = await refused(SqliteStore(path))
    assert str(path) in message
    assert "later version" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("statement", ["CREATE TABLE theirs (x)", "PRAGMA user_version = -1"])
async def test_a_database_of_another_program_is_refused_and_left_alone(
    path: Path, statement: str
) -> None:
    query(path, statement)
    before = path.read_bytes()
    message = await refused(SqliteStore(path))
    assert str(path) in message
    assert "another program" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"Dear diary,\n" * 100, b"Dear diary,\n" * 1000, b"SQLite format 3\0" + b"x" * 84]
)
async def test_a_file_that_is_no_database_is_refused_and_left_alone(
    path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    assert str(path) in await refused(SqliteStore(path))
    assert path.read_bytes() == content
    path.unlink()
    store = SqliteStore(path)  # nothing of the failure is in the way
    await store.open()
    await store.close()


async def test_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert f"{folder} is a folder" in await refused(SqliteStore(folder))
    assert "is a folder" in await refused(SqliteStore(Path("/")))
    assert "is a folder" in await refused(SqliteStore(Path()))
    assert list(tmp_path.iterdir()) == [folder]


async def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "chat.db", tmp_path / "file" / "deeper" / "chat.db"):
        assert str(path) in await refused(SqliteStore(path))


async def test_a_link_that_leads_to_itself_is_refused_before_any_thread_begins(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", None)
    path.symlink_to(path)
    assert str(path) in await refused(SqliteStore(path))


async def test_a_lock_that_cannot_be_made_is_told(path: Path) -> None:
    path.with_name("chat.db.lock").mkdir()
    assert "chat.db.lock" in await refused(SqliteStore(path))


@pytest.mark.parametrize("exists", [True, False])
async def test_a_file_that_cannot_be_written_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    # SQLite is told so, as a file's permissions do not bind whoever is root.
    store = SqliteStore(path)
    if exists:
        await store.open()
        await store.commit([whole(header())])
        await store.close()
    connect = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(
            sqlite3,
            "connect",
            lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options),
        )
        assert str(path) in await refused(store)
    await store.open()
    assert await found(store) == (["Hi."] if exists else None)
    await store.close()


@pytest.mark.parametrize("what", ["chat.db", "chat.db.lock", "."])
async def test_permissions_that_are_missing_are_told(path: Path, what: str) -> None:
    store = SqliteStore(path)
    if what != ".":
        await store.open()
        await store.close()
    target = path.parent / what
    mode = target.stat().st_mode
    target.chmod(mode & ~0o222)
    try:
        if os.access(target, os.W_OK):
            pytest.skip("permissions do not bind whoever is root")
        assert str(path) in await refused(store)
    finally:
        target.chmod(mode)


# SQLite: others who use the file.


async def test_a_file_has_one_store_at_a_time(file: SqliteStore, path: Path) -> None:
    other = SqliteStore(path)
    message = await refused(other)
    assert "another server" in message
    assert str(path) in message
    await file.commit([whole(header())])  # the first is none the worse for it
    await file.close()
    await other.open()
    assert await found(other) == ["Hi."]
    assert "another server" in await refused(file)
    await other.close()


async def test_a_store_that_is_open_cannot_be_opened_again(file: SqliteStore) -> None:
    with pytest.raises(ConfigError, match="another server"):
        await file.open()
    await file.commit([whole(header())])
    assert await found(file) == ["Hi."]


async def test_a_file_is_the_same_by_any_name(file: SqliteStore, path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    assert "another server" in await refused(SqliteStore(link))
    folder = path.parent / "folder"
    folder.symlink_to(path.parent)
    assert "another server" in await refused(SqliteStore(folder / "chat.db"))
    assert "another server" in await refused(SqliteStore(path.parent / "x" / ".." / "chat.db"))


async def test_a_store_does_not_move_with_the_current_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    store = SqliteStore(Path("chat.db"))
    monkeypatch.chdir("/")
    await store.open()
    await store.close()
    assert path.is_file()


async def test_the_lock_of_a_process_that_was_killed_is_free_and_its_commits_are_there(
    path: Path,
) -> None:
    script = f"""
import asyncio, pathlib, sys
from wsserver.pieces import Piece, Pieces
from wsserver.protocol import Prompt
from wsserver.stores.base import Entry, Header
from wsserver.stores.database import Connection
from wsserver.stores.migrations import MIGRATIONS
from wsserver.stores.sqlite import SqliteStore

async def main():
    store = SqliteStore(pathlib.Path({str(path)!r}))
    await store.open()
    header = Header("g", "me", "c", Prompt(prompt="Hello?"), "m")
    await store.commit([Entry(header, True, 0, Pieces([Piece("text", 0, "a")]))])
    await store.commit([Entry(header, False, 1, Pieces([Piece("text", 0, "b")]))])
    print("saved", flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SECONDS):
            assert await process.stdout.readline() == b"saved\n"
            assert "another server" in await refused(SqliteStore(path))
    finally:
        process.kill()
        async with asyncio.timeout(SECONDS):
            await process.communicate()
    store = SqliteStore(path)
    await store.open()
    stored = await store.find("g", "me")
    assert isinstance(stored, StoredGeneration)
    assert heard(stored.pieces) == ["a", "b"]
    assert stored.terminal is None
    await store.close()
    check(path)


async def test_one_that_died_with_its_process_is_purged_in_time(
    file: SqliteStore, clock: Clock
) -> None:
    await file.commit([entry(header(conversation=None), True, 0, ["a"])])
    await file.close()
    clock.now = 2000.0
    await file.open()
    await file.purge(2000.0)
    assert await found(file) == ["a"]
    await file.purge(2000.1)
    assert await found(file) is None


async def test_one_that_died_with_its_process_costs_what_its_model_does(
    path: Path, clock: Clock
) -> None:
    file = SqliteStore(path, prices=Prices(["dear=1/100"]))
    await file.open()
    dear = replace(header("dear", None), model="dear")
    await file.commit([entry(dear, True, 0, ["five hundred letters " * 4])])
    await file.close()
    await file.open()
    assert await file.spent("me", 0) == Spent(21, 2100)
    await file.close()


async def test_one_that_died_with_its_process_is_counted_as_what_it_said(
    file: SqliteStore, clock: Clock
) -> None:
    await file.commit([whole(header("ended", None))])
    await file.commit([entry(header("c"), True, 0, ["1234", Thinking("5678")])])
    await file.commit([entry(header("c"), True, 0, ["1234", Thinking("5678"), "\0"])])
    await file.commit([entry(header("o", None), True, 0, ["1"]), entry(header("silent"), new=True)])
    await file.commit([entry(header("o", None, owner="you"), True, 0, ["12345678"])])
    for day in (1, 2):
        await file.close()
        clock.now = day * DAY
        await file.open()
        assert [await tokens_spent(file, "me", day) for day in range(3)] == [8, 3 + 1, 0]
        assert [await tokens_spent(file, "you", day) for day in range(3)] == [0, 3, 0]


@pytest.mark.parametrize("texts", ["'[\"secret'", "x'ff'", "CAST(x'ff' AS TEXT)", "'{}'", "5"])
async def test_one_that_died_and_is_damaged_is_not_in_the_way_of_the_others(
    file: SqliteStore, path: Path, clock: Clock, texts: str
) -> None:
    await file.commit([entry(header("g"), True, 0, ["a"]), entry(header("h"), True, 0, ["b"])])
    await file.close()
    query(path, f"UPDATE piece SET texts = {texts} WHERE generation = 1")
    await file.open()
    assert await tokens_spent(file, "me", 0) == 1
    assert await found(file, "h") == ["b"]


async def test_those_that_died_are_found_without_looking_at_all_others(
    file: SqliteStore, path: Path
) -> None:
    plan = query(path, f"EXPLAIN QUERY PLAN {sqlite._DEAD}")
    assert [step[-1] for step in plan] == [
        "SEARCH generation USING INDEX generation_loose (ended=?)"
    ]


async def test_accounts_are_kept_for_ninety_days_and_purged_by_and_by(
    file: SqliteStore, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 2)
    for day in range(2):
        clock.now = day * DAY
        await file.commit([whole(header(f"{day}", "c", owner=f"{owner}")) for owner in range(5)])
    clock.now = 90 * DAY
    for left in (8, 6, 4, 2, 0, 0):
        await file.purge(0.0)
        assert query(path, "SELECT count(*) FROM counted") == [(left,)]
    assert [await tokens_spent(file, "4", day) for day in (0, 1)] == [8, 8]
    clock.now = 91 * DAY
    for left in (8, 6, 5, 5):
        await file.purge(0.0)
        assert query(path, "SELECT count(*) FROM spent") == [(left,)]
    assert [await tokens_spent(file, "4", day) for day in (0, 1)] == [0, 8]


async def test_a_lock_of_another_program_fails_writes_for_as_long_as_it_lasts(
    file: SqliteStore, path: Path
) -> None:
    await file.commit([whole(header())])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    async with asyncio.timeout(SECONDS):
        for attempt in (
            lambda: file.commit([whole(header("h"))]),
            lambda: file.rename("c", "me", "New"),
            lambda: file.delete("c", "me"),
            lambda: file.purge(1e12),
        ):
            with pytest.raises(StoreError, match="locked"):
                await attempt()
        assert await found(file) == ["Hi."]  # reads go on
        assert (await loaded(file)).title == "Hello?"
        assert await names(file) == ["c"]
    other.execute("ROLLBACK")
    other.close()
    await file.commit([whole(header("h"))])
    assert await found(file, "h") == ["Hi."]


async def test_a_lock_of_another_program_is_waited_for(path: Path) -> None:
    store = SqliteStore(path, timeout=SECONDS)
    await store.open()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    begun = threading.Event()
    await call_back(store._writer, lambda statement: begun.set())
    commit = asyncio.ensure_future(store.commit([whole(header())]))
    async with asyncio.timeout(SECONDS):
        await asyncio.to_thread(begun.wait, SECONDS)
        assert not commit.done()
        other.execute("ROLLBACK")
        await commit
    other.close()
    assert await found(store) == ["Hi."]
    await store.close()


async def test_a_file_that_another_program_has_locked_is_refused_until_it_is_free(
    path: Path,
) -> None:
    store = SqliteStore(path, timeout=0.01)
    await store.open()
    await store.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert "locked" in await refused(store)
    other.close()
    await store.open()
    await store.close()


# SQLite: what goes wrong in it.


async def test_a_full_disk_fails_the_whole_batch_and_nothing_after_it(file: SqliteStore) -> None:
    await file.commit([entry(header(), True, 0, ["Hi."]), whole(header("o", None))])
    ((pages,),) = await ask(file._writer, "PRAGMA page_count")
    await ask(file._writer, f"PRAGMA max_page_count = {pages + 2}")
    batch = [
        entry(header(), False, 1, ["more"]),
        *(whole(header(f"h{number}", f"d{number}"), "x" * 5000) for number in range(20)),
    ]
    for _ in range(2):
        with pytest.raises(StoreError, match="full"):
            await file.commit(batch)
        assert await found(file) == ["Hi."]
        assert await names(file) == ["c"]
        assert await found(file, "h0") is None
        assert query(file._path, "SELECT tokens FROM spent") == [(8,)]
    await file.commit([entry(header(), False, 1, ["little"])])  # for which there is room
    assert await found(file) == ["Hi.", "little"]
    await ask(file._writer, "PRAGMA max_page_count = 1000000")
    await file.commit(batch[1:])
    assert len(await names(file)) == 21
    assert await found(file, "h19") == ["x" * 5000]


async def test_one_entry_that_cannot_be_saved_fails_the_whole_batch(file: SqliteStore) -> None:
    bad = whole(header("h"), "half a pair: \ud800")
    with pytest.raises(Unsavable) as raised:
        await file.commit([whole(header()), bad, whole(header("i"))])
    assert raised.value.entry is bad
    assert "half" not in str(raised.value)
    assert await names(file) == []
    await file.commit([whole(header())])
    assert await names(file) == ["c"]


async def test_no_text_that_cannot_be_asked_for_is_another_error(file: SqliteStore) -> None:
    for attempt in (
        lambda: file.find("\ud800", "me"),
        lambda: load(file, "\ud800", "me", 1),
        lambda: file.list("\ud800", 1, None),
        lambda: file.rename("\ud800", "me", "x"),
        lambda: file.delete("\ud800", "me"),
        lambda: file.spent("\ud800", 0),
    ):
        with pytest.raises(StoreError):
            await attempt()
    assert await names(file) == []


async def all_that_can_be_asked(store: SqliteStore) -> int:
    """Ask a store in a broken file for everything, and return how much of it failed."""
    failures = 0
    for attempt in (
        lambda: store.find("g3", "me"),
        lambda: store.find("g9", "me"),
        lambda: load(store, "c3", "me", 100),
        lambda: load(store, "c3", "me", 2, 50),
        lambda: store.list("me", 100, None),
        lambda: store.rename("c3", "me", "New"),
        lambda: store.commit([whole(header(f"n{number}", f"c{number}")) for number in range(9)]),
        lambda: store.delete("c5", "me"),
        lambda: store.purge(1e12),
        lambda: store.spent("me", 0),
    ):
        try:
            await attempt()
        except StoreError:
            failures += 1
    return failures


async def test_a_broken_file_is_a_broken_store_and_nothing_worse(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    for turn in range(3):
        await store.commit(
            [
                whole(header(f"g{turn * 10 + n}", f"c{n}" if turn else None), "text " * 100, "🎈")
                for n in range(10)
            ]
        )
    await store.close()
    content = path.read_bytes()
    page = 4096
    assert len(content) > 10 * page
    chance = random.Random(5)
    breakages: list[tuple[int, bytes]] = []
    for start in range(page, len(content), page):
        breakages += [(start, bytes(page)), (start, b"\xff" * page)]
        breakages += [(start, chance.randbytes(page)), (start + 8, chance.randbytes(40))]
    for _ in range(40):  # and single bytes, by which one kind of value becomes another
        breakages.append((chance.randrange(page, len(content)), chance.randbytes(1)))
    failures = 0
    async with asyncio.timeout(2 * SECONDS):
        for number, (start, rubbish) in enumerate(breakages):
            broken = path.with_name(f"{number}.db")
            broken.write_bytes(content[:start] + rubbish + content[start + len(rubbish) :])
            store = SqliteStore(broken)
            try:
                await store.open()
            except ConfigError:
                failures += 1
            else:
                failures += await all_that_can_be_asked(store)
            await store.close()
    assert failures > len(breakages) / 2


async def test_a_file_whose_tables_cannot_be_told_is_refused(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.close()
    path.write_bytes(path.read_bytes().replace(b"WITHOUT ROWID", b"WITHOUT R\xffWID"))
    assert str(path) in await refused(store)


@pytest.mark.parametrize("size", [0, 50, 4096, 3 * 4096 + 17])
async def test_a_file_that_was_cut_short_is_a_broken_store_and_nothing_worse(
    path: Path, size: int
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header(f"g{n}", f"c{n}"), "text " * 100) for n in range(10)])
    await store.close()
    with path.open("r+b") as file:
        file.truncate(size)
    try:
        await store.open()
    except ConfigError:
        assert size
    else:
        assert bool(await all_that_can_be_asked(store)) == bool(size)
    await store.close()


@pytest.mark.parametrize(
    ("damage", "fails"),
    [
        ('UPDATE generation SET prompt = \'{"prompt": "secret\'', "both"),
        ('UPDATE generation SET prompt = \'{"prompt": ["secret"]}\'', "both"),
        ('UPDATE generation SET prompt = \'{"prompt": "", "system": "secret"}\'', "find"),
        ("UPDATE generation SET prompt = '[\"secret\"]'", "both"),
        ("UPDATE generation SET prompt = x'ff'", "both"),
        ("UPDATE generation SET prompt = 5", "both"),
        ('UPDATE generation SET terminal = \'{"type": "secret"}\'', "both"),
        ("UPDATE generation SET terminal = '[]'", "both"),
        ("UPDATE generation SET text = 'secret'", "find"),
        ("UPDATE generation SET text = CAST(x'736563726574ff' AS TEXT)", "both"),
        ("UPDATE generation SET lengths = '[3, \"secret\"]'", "find"),
        ("UPDATE generation SET lengths = '{\"secret\": 1}'", "find"),
        ("UPDATE generation SET lengths = '[3'", "find"),
        ("UPDATE generation SET lengths = '[1, 1]'", "find"),
        ("UPDATE generation SET lengths = '[3, -5]'", "find"),
        ("UPDATE generation SET lengths = x'ff'", "find"),
        ("UPDATE generation SET thinking = 'secret'", "both"),
        ("UPDATE generation SET thinking = 5", "both"),
        ("DROP TABLE generation", "both"),
        ("UPDATE piece SET texts = '[\"secret'", "both"),
        ('UPDATE piece SET texts = \'[["secret", "secret"]]\'', "both"),
        ("UPDATE piece SET texts = '[\"secret\", []]'", "both"),
        ("UPDATE piece SET texts = '\"secret\"'", "both"),
        ("UPDATE piece SET texts = x'ff'", "both"),
        ("UPDATE piece SET texts = CAST(x'736563726574ff' AS TEXT)", "both"),
        ("UPDATE piece SET texts = 5", "both"),
        ("UPDATE piece SET after = 'secret'", "both"),
        ("UPDATE piece SET after = 0.5", "both"),
        ("DROP TABLE piece", "both"),
    ],
)
async def test_damage_is_an_error_that_does_not_tell_what_was_said(
    path: Path, damage: str, fails: str
) -> None:
    store = SqliteStore(path)
    await store.open()
    running = "piece" in damage
    await store.commit([entry(header(), True, 0, ["Hi."]) if running else whole(header())])
    query(path, damage)
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "find": lambda: store.find("g", "me"),
        "load": lambda: load(store, "c", "me", 10),
    }
    for name, attempt in attempts.items():
        if fails not in {name, "both"}:
            await attempt()
            continue
        with pytest.raises(StoreError) as raised:
            await attempt()
        assert "secret" not in str(raised.value)
        assert "\n" not in str(raised.value)
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__
    assert await names(store) == ["c"]
    await store.close()


async def test_a_closed_store_fails(file: SqliteStore) -> None:
    await file.close()
    assert await all_that_can_be_asked(file) == 10


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_file_that_is_gone_fails_what_would_be_written_to_it(
    path: Path, suffix: str, how: str
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    file, aside = Path(f"{path}{suffix}"), path.with_name("aside")
    file.rename(aside)
    if how == "replaced":
        file.write_bytes(aside.read_bytes())
    for attempt in (
        store.probe,
        lambda: store.commit([whole(header("h"))]),
        lambda: store.rename("c", "me", "New"),
        lambda: store.delete("c", "me"),
        lambda: store.purge(1e12),
    ):
        with pytest.raises(StoreError, match="was deleted or replaced"):
            await attempt()
    assert await found(store) == ["Hi."]
    aside.rename(file)
    await store.probe()
    await store.commit([whole(header("h"))])
    await store.close()
    assert len(query(path, "SELECT * FROM generation")) == 2


async def test_a_damaged_file_is_refused_at_the_start(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header(f"g{n}"), "x" * 10_000) for n in range(100)])
    await store.close()
    content = bytearray(path.read_bytes())
    for start in range(30 * 4096, len(content) - 4096, 3 * 4096):
        content[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    message = await refused(store)
    assert "is damaged" in message
    assert ".recover" in message


async def test_a_large_file_is_checked_while_it_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header(f"g{n}"), "x" * 10_000) for n in range(100)])
    await store.close()
    monkeypatch.setattr(sqlite, "CHECKED_AT_ONCE", 100_000)
    await store.open()
    await store.probe()
    await store.close()
    content = bytearray(path.read_bytes())
    for start in range(30 * 4096, len(content) - 4096, 3 * 4096):
        content[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    try:
        await store.open()
        await until(lambda: "the store is damaged" in caplog.text)
        with pytest.raises(StoreError, match="damaged"):
            await store.probe()
    finally:
        await store.close()


async def test_damage_that_a_read_meets_is_told_by_the_probe(file: SqliteStore) -> None:
    await file.probe()

    def meet(database: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT_VTAB
        raise error

    assert file._reader is not None
    with pytest.raises(StoreError, match="malformed"):
        await file._reader.transact(meet, "BEGIN")
    with pytest.raises(StoreError, match="damaged"):
        await file.probe()


# SQLite: what is deleted.


def traces_in(path: Path, word: bytes) -> list[str]:
    """Return the files beside a database in which a word is."""
    return [file.name for file in path.parent.glob("chat.db*") if word in file.read_bytes()]


@pytest.mark.parametrize("size", [1, 300, 3000, 100_000])
async def test_deleted_text_is_in_none_of_the_files(
    file: SqliteStore, path: Path, size: int
) -> None:
    def said(number: int, word: str) -> str:
        return f"{word}{number} ".rjust(size, "x")

    for number in range(60):
        conversation = "secret" if number % 3 else "kept"
        word = "Geheimnis" if number % 3 else "Bekanntes"
        asked = header(f"g{number}", conversation, prompt=said(number, word))
        await file.commit([entry(asked, True, 0, [said(number, word)])])
        await file.commit(
            [entry(asked, False, 1, [Thinking(said(number, word)), said(number, word)], done())]
        )
    await file.rename("secret", "me", "Geheimnis")
    await file.commit([whole(header("o", None, prompt="Geheimnis?"), "Geheimnis.")])
    assert traces_in(path, b"Geheimnis")
    assert await file.delete("secret", "me")
    await file.purge(1e12)
    assert traces_in(path, b"Geheimnis") == []
    assert traces_in(path, b"Bekanntes")
    assert len((await loaded(file, "kept")).turns) == 20


async def test_deleted_text_goes_from_the_wal_when_nobody_reads_it_any_more(
    file: SqliteStore, path: Path
) -> None:
    await file.commit([whole(header(), "Geheimnis")])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM generation").fetchall()
    assert await file.delete("c", "me")
    assert traces_in(path, b"Geheimnis")  # the other program still may ask for it
    other.execute("COMMIT")
    other.close()
    await file.purge(0.0)
    assert traces_in(path, b"Geheimnis") == []


async def test_delete_does_not_wait_for_another_program_that_reads_the_file(path: Path) -> None:
    store = SqliteStore(path, timeout=3600.0)
    await store.open()
    await store.commit([whole(header(), "Geheimnis")])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM generation").fetchall()
        try:
            async with asyncio.timeout(SECONDS):
                assert await store.delete("c", "me")
                await store.purge(0.0)
                await store.commit([whole(header("g2"), "x")])
        finally:
            other.execute("COMMIT")
    await store.close()


async def test_a_large_conversation_is_deleted_in_steps_between_which_others_write(
    file: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "DELETED_AT_ONCE", 50_000)
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 7)
    await file.commit([whole(header(f"g{n}"), "x" * 1000) for n in range(20)])
    await file.commit([whole(header(f"h{n}"), "x" * 30_000) for n in range(6)])
    statements = await trace(file._writer)
    deleting = asyncio.ensure_future(file.delete("c", "me"))
    writing = [asyncio.ensure_future(file.commit([whole(header(f"o{n}", "o"))])) for n in range(3)]
    assert await deleting
    await asyncio.gather(*writing)
    kinds = {"DELETE FROM generation": "step", "INSERT INTO counted": "commit"}
    found = [kind for said in statements for word, kind in kinds.items() if said.startswith(word)]
    order = [kind for kind, _ in itertools.groupby(found)]
    assert order[:3] == ["step", "commit", "step"]
    assert await names(file) == ["o"]


async def test_deletes_at_once_empty_the_wal_together_and_none_is_refused(
    file: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair, "MOST_WAITING", 30)
    owners = ["me", "you", "they"]
    for owner in owners:
        await file.commit(
            [
                whole(header(f"g{n}", f"c{n}", prompt="Geheimnis", owner=owner))
                for n in range(fair.MOST_WAITING)
            ]
        )
    statements = await trace(file._writer)
    deletes = [file.delete(f"c{n}", owner) for n in range(30) for owner in owners]
    deleting = [asyncio.ensure_future(delete) for delete in deletes]
    await asyncio.wait(deleting, timeout=0)
    writing = asyncio.ensure_future(file.commit([whole(header("o", "o"))]))
    assert all(await asyncio.gather(*deleting))
    await writing
    order = [
        kind
        for said in statements
        for word, kind in {"PRAGMA wal": "empty", "INSERT INTO counted": "commit"}.items()
        if said.startswith(word)
    ]
    assert order.count("empty") <= 30 + 2
    assert order.index("commit") <= 2
    assert traces_in(path, b"Geheimnis") == []


async def test_a_delete_that_a_crash_has_cut_short_is_finished_at_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 2)
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header(f"g{n}")) for n in range(5)])
    await store.commit([whole(header("h", "d"))])
    monkeypatch.setattr(store, "_erase", None)
    steps = 0
    delete_some = sqlite._delete_some

    def dies(database: sqlite3.Connection, owner: str, conversation: str) -> bool:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise sqlite3.OperationalError("the process dies here")
        return delete_some(database, owner, conversation)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "_delete_some", dies)
        with pytest.raises(StoreError):
            await store.delete("c", "me")
    assert await names(store) == ["d"]
    assert await load(store, "c", "me", 10) is None
    await store.close()
    await store.open()
    assert await names(store) == ["d"]
    assert len(query(path, "SELECT * FROM generation")) == 1
    assert isinstance(await store.find("g4", "me"), Forgotten)
    await store.close()


async def test_a_turn_that_is_accepted_after_half_a_delete_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header("1"), "one")])
    query(path, "INSERT INTO deleting VALUES ('me', 'c')")
    await store.commit([whole(header("2"), "two")])
    await store.close()
    await store.open()
    assert [turn.text for turn in (await loaded(store)).turns] == ["one", "two"]
    await store.close()


@pytest.mark.parametrize("size", [1, 100, 2000, 50_000])
async def test_what_an_owner_has_is_about_what_it_takes_on_the_disk(
    file: SqliteStore, path: Path, size: int
) -> None:
    count = max(40, 400_000 // size // 10)
    for number in range(count):
        pieces = [f"{word} " for word in ("x" * size).replace("xxxxx", "xxxx ").split()]
        name = f"generation-{number:012}"
        await file.commit([whole(header(name, f"conversation-{number % 20:010}"), *pieces)])
    await file._erase()
    held, taken = (await file.held("me")).bytes, path.stat().st_size
    assert 0.6 < held / (taken - 90_000) < 1.6, (held, taken)


# SQLite: threads and transactions.


async def ask(connection: Connection | None, statement: str) -> list[Any]:
    """Run a statement in a connection's thread."""
    assert connection is not None
    return await connection.call(lambda database: database.execute(statement).fetchall())


async def call_back(
    connection: Connection | None, callback: Callable[[str], object] | None
) -> None:
    """Have each statement of a connection told before it runs, in its thread."""
    assert connection is not None
    await connection.call(lambda database: database.set_trace_callback(callback))


async def trace(connection: Connection | None, statements: list[str] | None = None) -> list[str]:
    """Return the list to which each statement of a connection is added."""
    statements = [] if statements is None else statements
    await call_back(connection, statements.append)
    return statements


async def read_by(store: SqliteStore) -> list[tuple[Any, ...]]:
    """Return the list to which each row that the store reads is added."""
    rows: list[tuple[Any, ...]] = []

    def note(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> tuple[Any, ...]:
        rows.append(row)
        return row

    def set_up(database: sqlite3.Connection) -> None:
        database.row_factory = note

    assert store._reader is not None
    await store._reader.call(set_up)
    return rows


class Hold:
    """Holds a connection's thread before a statement, counted from 1, until it is let go on."""

    def __init__(self, connection: Connection | None, at: int) -> None:
        self._connection = connection
        self._at = at
        self._reached = threading.Event()
        self._go_on = threading.Event()

    async def __aenter__(self) -> Self:
        await call_back(self._connection, self._called)
        return self

    def _called(self, statement: str) -> None:
        self._at -= 1
        if self._at == 0:
            self._reached.set()
            self._go_on.wait(SECONDS)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, SECONDS)

    async def __aexit__(self, *_: object) -> None:
        self._go_on.set()


def cancel() -> None:
    """Cancel what runs, at the next point where it waits."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def test_a_commit_that_is_cancelled_is_made_as_a_whole_or_not_at_all(
    file: SqliteStore, clock: Clock
) -> None:
    statements = await trace(file._writer)
    await file.commit([whole(header("whole", "whole")), whole(header("outside", None))])
    assert statements[0].startswith("BEGIN")
    assert statements[-1] == "COMMIT"
    for number in range(1, len(statements) + 1):
        batch = [whole(header(f"g{number}", f"c{number}")), whole(header(f"o{number}", None))]
        async with Hold(file._writer, number) as hold:
            commit = asyncio.ensure_future(file.commit(batch))
            waits = asyncio.ensure_future(file.commit([whole(header(f"w{number}", "waits"))]))
            await hold.reached()
            commit.cancel()
            waits.cancel()
            await asyncio.wait({commit, waits})
        assert commit.cancelled()
        assert waits.cancelled()
        await file.commit([whole(header(f"after{number}", "whole"))])
        assert await found(file, f"after{number}") == ["Hi."]
        # It had begun, and went on in its thread.
        assert [await found(file, name + str(number)) for name in "go"] == [["Hi."]] * 2
        assert await found(file, f"w{number}") is None
        assert await tokens_spent(file, "me", 0) == 8 * (2 + 3 * number)


async def test_a_read_that_is_cancelled_does_not_hold_on_to_what_it_saw(file: SqliteStore) -> None:
    await file.commit([whole(header())])
    statements = await trace(file._reader)
    await loaded(file)
    for number in range(1, len(statements) + 1):
        async with Hold(file._reader, number) as hold:
            reading = asyncio.ensure_future(load(file, "c", "me", 10))
            await hold.reached()
            reading.cancel()
            await asyncio.wait({reading})
        assert reading.cancelled()
        await file.commit([whole(header(f"g{number}"))])
        assert await found(file, f"g{number}") == ["Hi."]


async def test_an_opening_that_is_cancelled_leaves_nothing_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Connection._run
    trips = at = 0

    def watched(self: Connection, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        nonlocal trips
        trips += 1
        if trips == at:
            cancel()
        return run(self, work)

    monkeypatch.setattr(Connection, "_run", watched)
    store = SqliteStore(path)
    await store.open()
    needed = trips
    await store.close()
    for number in range(1, needed + 1):
        trips, at = 0, number
        opening = asyncio.ensure_future(store.open())
        async with asyncio.timeout(SECONDS):
            with pytest.raises(asyncio.CancelledError):
                await opening
            at = 0
            await store.open()
            await store.close()


async def test_commits_are_made_one_after_another(file: SqliteStore) -> None:
    statements = await trace(file._writer)
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(
            *(file.commit([whole(header(f"g{number}"))]) for number in range(5)),
            file.rename("unknown", "me", "x"),
            file.delete("unknown", "me"),
            file.purge(0.0),
        )
    first_words = [statement.split()[0] for statement in statements]
    edges = [word for word in first_words if word in {"BEGIN", "COMMIT", "ROLLBACK"}]
    assert edges == ["BEGIN", "COMMIT"] * 8
    assert len((await loaded(file)).turns) == 5


async def test_reads_at_the_same_time_are_none_the_worse_for_each_other(
    file: SqliteStore,
) -> None:
    await file.commit([whole(header())])
    async with asyncio.timeout(SECONDS):
        for _ in range(5):
            conversation, stored, summaries = await asyncio.gather(
                load(file, "c", "me", 10), file.find("g", "me"), file.list("me", 10, None)
            )
            assert conversation is not None
            assert isinstance(stored, StoredGeneration)
            assert len(conversation.turns) == len(stored.pieces) == len(summaries) == 1


async def test_a_read_sees_one_moment_of_the_file(file: SqliteStore) -> None:
    await file.commit([entry(header(), True, 0, ["a"])])
    async with Hold(file._reader, 3) as hold:
        finding = asyncio.ensure_future(file.find("g", "me"))
        await hold.reached()
        await file.commit([entry(header(), False, 1, ["b"], done())])
    stored = await finding
    assert isinstance(stored, StoredGeneration)
    assert (heard(stored.pieces), stored.terminal) == (["a"], None)
    assert await found(file) == ["a", "b"]

    async with Hold(file._reader, 3) as hold:
        loading = asyncio.ensure_future(loaded(file))
        await hold.reached()
        await file.delete("c", "me")
    assert [turn.text for turn in (await loading).turns] == ["ab"]
    assert await load(file, "c", "me", 10) is None


async def test_a_close_lets_a_commit_be_finished(file: SqliteStore) -> None:
    async with Hold(file._writer, 1) as hold:
        commit = asyncio.ensure_future(file.commit([whole(header())]))
        await hold.reached()
        closing = asyncio.gather(file.close(), file.close())
        await asyncio.wait({closing}, timeout=0)
        assert not closing.done()
    async with asyncio.timeout(SECONDS):
        await closing
        assert commit.done()
        await commit
    await file.open()
    assert await found(file) == ["Hi."]


async def test_a_close_that_is_cancelled_can_be_made_again(file: SqliteStore) -> None:
    async with Hold(file._writer, 1) as hold:
        commit = asyncio.ensure_future(file.commit([whole(header())]))
        await hold.reached()
        close = asyncio.ensure_future(file.close())
        await asyncio.wait({close}, timeout=0)
        close.cancel()
        await asyncio.wait({close})
    async with asyncio.timeout(SECONDS):
        await commit
        assert await found(file) == ["Hi."]
        await file.close()


async def test_nothing_is_left_to_the_garbage_collector(path: Path) -> None:
    before = workers()
    store = SqliteStore(path)
    await store.open()
    assert len(workers() - before) == 2
    await store.commit([whole(header())])
    await loaded(store)
    await refused(SqliteStore(path))
    await store.close()
    for thread in workers() - before:
        thread.join(SECONDS)
    assert workers() == before
    del store
    gc.collect()  # whose warnings are errors


async def test_a_store_that_was_never_opened_can_be_closed(path: Path) -> None:
    await SqliteStore(path).close()
    assert not path.exists()


# SQLite: how much work it is.


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The list to which a connection is added each time that it is asked for something."""
    trips: list[Connection] = []
    run = Connection._run

    def watched(self: Connection, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        trips.append(self)
        return run(self, work)

    monkeypatch.setattr(Connection, "_run", watched)
    return trips


async def test_a_batch_takes_one_trip_to_the_thread_however_large_it_is(
    file: SqliteStore, trips: list[Connection]
) -> None:
    await file.commit([whole(header(f"g{number}", f"c{number}")) for number in range(800)])
    assert len(trips) == 1
    assert len(await names(file)) == 800


async def test_a_history_takes_one_trip_to_the_thread_however_long_it_is(
    file: SqliteStore, trips: list[Connection]
) -> None:
    await file.commit([whole(header(f"g{number}")) for number in range(200)])
    trips.clear()
    assert len((await loaded(file)).turns) == 200
    assert len(trips) == 1
    await found(file, "g7")
    assert len(trips) == 2


async def test_a_long_prompt_is_read_once_and_not_with_every_piece(file: SqliteStore) -> None:
    asked = header(prompt="x" * 30_000)
    await file.commit([entry(asked, new=True)])
    for number in range(100):
        await file.commit([entry(asked, after=number, pieces=["y"])])
    rows = await read_by(file)
    assert (await loaded(file)).turns[0].text == "y" * 100
    assert await found(file) == ["y"] * 100
    characters = sum(len(value) for row in rows for value in row if isinstance(value, str))
    assert 60_000 < characters < 67_000


async def test_a_reply_that_has_ended_is_read_as_one_text_and_not_as_pieces(
    file: SqliteStore,
) -> None:
    await file.commit([entry(header("g1"), True, 0, ["y"] * 100, done())])
    await file.commit([entry(header("g2"), True, 0, ["z"])])
    rows = await read_by(file)
    assert [turn.text for turn in (await loaded(file)).turns] == ["y" * 100, "z"]
    assert len(rows) == 1 + 2 + 1  # the conversation, its turns, and one row of pieces


async def test_no_more_is_read_than_the_answer_has_room_for(file: SqliteStore) -> None:
    await file.commit(
        [
            whole(header(f"g{number}", prompt="p" * 5_000), Thinking("t" * 500), "x" * 4_500)
            for number in range(201)
        ]
    )
    rows = await read_by(file)
    stored = await file.load("c", "me", limit=200, size=100_000)
    assert stored is not None
    assert len(stored.turns) == 9
    assert len(rows) == 1 + 9 + 1  # the title, the turns, whether there are older ones
    read = sum(len(value) for row in rows for value in row if isinstance(value, str))
    assert read < 100_000


async def test_turns_that_are_not_in_the_history_make_no_request_slower(file: SqliteStore) -> None:
    async def steps_of_a_retry_and_a_history(name: str, retried: str) -> int:
        """Count the steps of SQLite's virtual machine, a hundred at a time."""
        steps: list[None] = []

        def note() -> None:
            steps.append(None)

        for connection in (file._writer, file._reader):
            assert connection is not None
            await connection.call(lambda database: database.set_progress_handler(note, 100))
        again = Header(name, "me", "c", Prompt(prompt="Hello?"), "m", 500.0, retried)
        await file.commit([whole(again)])
        assert [turn.id for turn in (await loaded(file)).turns] == [name]
        stored = await load(file, "c", "me", 10, before=2)
        assert stored is not None
        assert not stored.older
        for connection in (file._writer, file._reader):
            assert connection is not None
            await connection.call(lambda database: database.set_progress_handler(None, 0))
        return len(steps)

    await file.commit([whole(header("g0"))])
    few = await steps_of_a_retry_and_a_history("g1", "g0")
    for number in range(2, 1000):
        retry = Header(
            f"g{number}", "me", "c", Prompt(prompt="Hello?"), "m", 500.0, f"g{number - 1}"
        )
        await file.commit([whole(retry)])
    assert await steps_of_a_retry_and_a_history("g1000", "g999") <= 2 * few + 5


async def test_an_ended_reply_is_one_row_however_many_pieces_it_has(
    file: SqliteStore, path: Path
) -> None:
    asked = header()
    for number in range(200):
        await file.commit([entry(asked, not number, number, [f"piece {number} "])])
    assert query(path, "SELECT count(*) FROM piece") == [(200,)]
    await file.commit([entry(asked, False, 200, [Thinking("hm")], done())])
    assert query(path, "SELECT count(*) FROM piece") == [(0,)]
    assert await found(file) == [*(f"piece {number} " for number in range(200)), "hm"]
    ((row,),) = query(
        path, "SELECT quote(text) || quote(thinking) || quote(lengths) FROM generation"
    )
    assert row.count("piece 17 ") == 1


async def test_pieces_of_an_older_version_are_packed_by_and_by(
    file: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 2)
    pieces = ["a", Thinking("b"), "c"]
    await file.commit([whole(header(f"g{number}"), *pieces) for number in range(5)])
    query(path, "UPDATE generation SET lengths = NULL, thinking = NULL, runs = NULL")
    query(
        path,
        'INSERT INTO piece SELECT number, 0, \'["a", ["b"]]\' FROM generation '
        "UNION ALL SELECT number, 2, '[\"c\"]' FROM generation",
    )
    query(path, "UPDATE piece SET texts = '[' WHERE generation = 2")
    before = await loaded(file)
    for left in (8, 4, 2, 2):
        await file.purge(0.0)
        assert query(path, "SELECT count(*) FROM piece") == [(left,)]
        assert await found(file, "g0") == pieces
        assert await found(file, "g4") == pieces
    assert await loaded(file) == before


async def test_owners_take_turns_at_the_store(file: SqliteStore) -> None:
    await file.commit([whole(header()), whole(header(owner="you"))])
    order: list[str] = []

    async def ask_as(owner: str) -> None:
        await load(file, "c", owner, 10)
        order.append(owner)

    async with asyncio.timeout(SECONDS), Hold(file._reader, 1) as hold:
        first = asyncio.ensure_future(ask_as("me"))
        await hold.reached()
        tasks = [asyncio.ensure_future(ask_as("me")) for _ in range(50)]
        tasks += [asyncio.ensure_future(ask_as(owner)) for owner in ("you", "they", "you")]
        await asyncio.wait(tasks, timeout=0)
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(first, *tasks)
    assert order[:6] == ["me", "me", "you", "they", "me", "you"]
    assert order[6:] == ["me"] * 48


async def test_one_owner_has_so_many_requests_wait_for_the_store(
    file: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair, "MOST_WAITING", 2)
    async with asyncio.timeout(SECONDS), Hold(file._reader, 1) as hold:
        tasks = [asyncio.ensure_future(file.list("me", 1, None)) for _ in range(3)]
        await hold.reached()
        with pytest.raises(Refused) as raised:
            await file.list("me", 1, None)
        assert raised.value.code is Code.LIMIT
        tasks.append(asyncio.ensure_future(file.list("you", 1, None)))
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        tasks.append(asyncio.ensure_future(file.list("me", 1, None)))
    async with asyncio.timeout(SECONDS):
        await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [False, True, False, False, False]
    assert await file.list("me", 1, None) == []


async def test_a_turn_that_comes_to_whoever_is_cancelled_is_passed_on() -> None:
    lock = fair.FairLock()
    await lock.acquire("a")
    second = asyncio.ensure_future(lock.acquire("b"))
    third = asyncio.ensure_future(lock.acquire("c"))
    await asyncio.wait({second, third}, timeout=0)
    lock.release()
    second.cancel()  # before it knows that its turn has come
    async with asyncio.timeout(SECONDS):
        await asyncio.wait({second})
        await third
        lock.release()
        await lock.acquire("a")
    lock.release()


async def test_a_new_file_is_for_its_owner_only(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    modes = {
        file.stat().st_mode & 0o077
        for file in path.parent.glob(f"{path.name}*")
        if file.stat().st_size
    }
    await store.close()
    assert modes == {0}
