"""Helpers of the tests of stores."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.pieces import Thinking, heard, said
from wsserver.content import Message, Usage
from wsserver.errors import Code, ConfigError
from wsserver.prices import Spent
from wsserver.protocol import Done, Error, Prompt, StoppedBy, Terminal
from wsserver.stores import Store
from wsserver.stores.base import (
    Amounts,
    Entry,
    Header,
    StoredConversation,
    StoredGeneration,
)
from wsserver.stores.database import Connection
from wsserver.stores.sqlite import SqliteStore

SECONDS = 20  # bound of every wait


DAY = 86400.0


TOKENS = Usage(input_tokens=3, output_tokens=5)


# Unusual characters, and texts that look like stored records.
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
    """A store that closes and opens again before each call."""

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

    async def amounts(self, owner: str) -> Amounts:
        async with self._again():
            return await super().amounts(owner)

    async def idle(self, *args: Any) -> Any:
        async with self._again():
            return await super().idle(*args)

    async def probe(self) -> None:
        async with self._again():
            await super().probe()


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def workers() -> set[threading.Thread]:
    """Return the threads of connections, without other threads of the event loop."""
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
    usage = Usage(input_tokens=tokens - 1, output_tokens=1)
    return Done(id="g", seq=1, reason="end_turn", usage=usage)


def entry(
    header: Header,
    new: bool = False,
    after: int = 0,
    pieces: Sequence[str] = (),
    terminal: Terminal | None = None,
    *,
    withdrawn: bool = False,
) -> Entry:
    return Entry(header, new, after, said(*pieces, block=after), terminal, withdrawn)


def whole(header: Header, *pieces: str, terminal: Terminal | None = None) -> Entry:
    return entry(header, True, 0, pieces or ("Hi.",), terminal or done())


def kinds(pieces: Sequence[str]) -> list[tuple[type[str], str]]:
    return [(type(piece), piece) for piece in pieces]


async def tokens_spent(store: Store, owner: str, day: int) -> int:
    return (await store.spent(owner, day)).tokens


async def found(store: Store, name: str = "g", owner: str = "me") -> list[str] | None:
    stored = await store.find(owner, name)
    return heard(stored.pieces) if isinstance(stored, StoredGeneration) else None


async def load(
    store: Store, name: str, owner: str, limit: int, before: int | None = None
) -> StoredConversation | None:
    """Load turns of any size."""
    return await store.load(owner, name, limit=limit, size=10**9, before=before)


async def loaded(store: Store, name: str = "c", owner: str = "me") -> StoredConversation:
    stored = await load(store, name, owner, 1000)
    assert stored is not None
    return stored


async def listed(store: Store, owner: str = "me") -> list[tuple[str, str, float, float]]:
    return [(s.id, s.title, s.created, s.updated) for s in await store.list(owner, 100, None)]


async def names(store: Store, owner: str = "me") -> list[str]:
    return [summary.id for summary in await store.list(owner, 1000, None)]


async def trace_of(store: Store, name: str = "g", owner: str = "me") -> float | None:
    """Return when a generation was deleted; None for an unknown generation."""
    stored = await store.find(owner, name)
    assert not isinstance(stored, StoredGeneration)
    return None if stored is None else stored.when


async def texts(store: Store) -> list[tuple[int, str]]:
    return [(turn.number, turn.text) for turn in (await loaded(store)).turns]


async def refused(store: SqliteStore) -> str:
    """Open a store that cannot be opened; return the error message."""
    try:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(ConfigError, match=r"^store: ") as raised:
                await store.open()
    finally:
        await store.close()
    assert "\n" not in str(raised.value)
    return str(raised.value)


async def ask(connection: Connection, statement: str) -> list[Any]:
    """Run a statement in a connection's thread."""
    return await connection.call(lambda database: database.execute(statement).fetchall())


async def call_back(connection: Connection, callback: Callable[[str], object] | None) -> None:
    """Call back before each statement of a connection, in the thread of the connection."""
    await connection.call(lambda database: database.set_trace_callback(callback))


async def trace(connection: Connection, statements: list[str] | None = None) -> list[str]:
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

    await store.reader.call(set_up)
    return rows


class Hold:
    """Holds the thread of a connection before a statement, counted from 1."""

    def __init__(self, connection: Connection, at: int) -> None:
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
