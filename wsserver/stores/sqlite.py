"""The store in a SQLite file, off the event loop, with one writer.

Written in WAL mode with ``synchronous = NORMAL``: what was committed survives the death of the
process at any moment, and a power failure leaves the file whole, though perhaps a little older.
https://www.sqlite.org/wal.html
"""

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import aiosqlite
from pydantic import Json, TypeAdapter, ValidationError

from wsserver.errors import ConfigError, StoreError
from wsserver.generation import Thinking, tokens_in
from wsserver.protocol import Prompt, Terminal
from wsserver.stores.base import (
    Entry,
    Header,
    StoredConversation,
    StoredGeneration,
    Summary,
    Turn,
    day_of,
    partial,
    text_of,
    title_of,
    tokens_of,
)

__all__ = ["SqliteStore"]

PURGED_AT_ONCE = 200  # rows of each kind, so that no other write waits for long
DAYS_KEPT = 90  # that there are accounts of
MAX_NUMBER = 2**63 - 1  # SQLite's largest integer

# Each brings the file from the version that is its place in this list to the next.
MIGRATIONS = [
    """
    CREATE TABLE conversation (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        title TEXT NOT NULL,
        created REAL NOT NULL,
        updated REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX conversation_by_owner ON conversation (owner, updated, id);
    CREATE TABLE generation (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        ended REAL,
        owner TEXT NOT NULL,
        conversation TEXT REFERENCES conversation (id) ON DELETE CASCADE,
        prompt TEXT NOT NULL,
        model TEXT NOT NULL,
        terminal TEXT,
        text TEXT, -- all of its text, once it has ended
        UNIQUE (owner, id, began)
    );
    CREATE INDEX generation_by_conversation ON generation (conversation, number);
    CREATE TABLE piece (
        generation INTEGER NOT NULL REFERENCES generation (number) ON DELETE CASCADE,
        after INTEGER NOT NULL,
        texts TEXT NOT NULL,
        PRIMARY KEY (generation, after)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE spent (
        owner TEXT NOT NULL,
        day INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        PRIMARY KEY (owner, day)
    ) WITHOUT ROWID;
    CREATE INDEX spent_by_day ON spent (day);
    -- What is in the accounts, deleted or not, for as long as its end may be saved again.
    CREATE TABLE counted (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        day INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        PRIMARY KEY (owner, id, began)
    ) WITHOUT ROWID;
    CREATE INDEX counted_by_day ON counted (day);
    CREATE TRIGGER spend AFTER INSERT ON counted BEGIN
        INSERT INTO spent VALUES (new.owner, new.day, new.tokens)
        ON CONFLICT (owner, day) DO UPDATE SET tokens = tokens + excluded.tokens;
    END;
    CREATE INDEX generation_without_end ON generation (ended) WHERE ended IS NULL;
    """,
    """
    CREATE TABLE new_conversation (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        title TEXT NOT NULL,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        PRIMARY KEY (owner, id)
    ) WITHOUT ROWID;
    INSERT INTO new_conversation SELECT owner, id, title, created, updated FROM conversation;
    -- What somebody else may have said in one is theirs from now on.
    INSERT INTO new_conversation
        SELECT owner, conversation, '…', min(began), max(coalesce(ended, began)) FROM generation
        WHERE conversation IS NOT NULL GROUP BY owner, conversation
        ON CONFLICT (owner, id) DO NOTHING;
    CREATE TABLE new_generation (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        ended REAL,
        owner TEXT NOT NULL,
        conversation TEXT,
        turn INTEGER, -- its number in the conversation, from 1
        prompt TEXT NOT NULL,
        model TEXT NOT NULL,
        terminal TEXT,
        text TEXT, -- all of its text, once it has ended
        UNIQUE (owner, id, began),
        UNIQUE (owner, conversation, turn),
        FOREIGN KEY (owner, conversation) REFERENCES conversation (owner, id) ON DELETE CASCADE
    );
    INSERT INTO new_generation
        SELECT number, id, began, ended, owner, conversation, CASE WHEN conversation IS NOT NULL
        THEN row_number() OVER (PARTITION BY owner, conversation ORDER BY number) END,
        prompt, model, terminal, text FROM generation;
    DROP TABLE generation;
    DROP TABLE conversation;
    ALTER TABLE new_conversation RENAME TO conversation;
    ALTER TABLE new_generation RENAME TO generation;
    CREATE INDEX conversation_by_owner ON conversation (owner, updated, id);
    CREATE INDEX generation_without_end ON generation (ended) WHERE ended IS NULL;
    CREATE INDEX generation_outside ON generation (ended) WHERE conversation IS NULL;
    """,
]

_COUNT = "INSERT INTO counted VALUES (?, ?, ?, ?, ?) ON CONFLICT (owner, id, began) DO NOTHING"
_BURY = "UPDATE generation SET ended = ? WHERE ended IS NULL"

_TERMINAL: TypeAdapter[Terminal] = TypeAdapter(Terminal)
# Pieces are rows of the number that they come after and JSON: text as it is, thinking in a list.
_PARTS: TypeAdapter[Sequence[tuple[int, Json[Sequence[str | tuple[str]]]]]] = TypeAdapter(
    list[tuple[int, Json[list[str | tuple[str]]]]]
)


class SqliteStore:
    """Keeps everything in one file, which it makes if need be, folders included.

    Args:
        path: the file.
        timeout: seconds to wait for a lock that another program has on the file.
    """

    def __init__(self, path: Path, timeout: float = 5.0) -> None:
        self._path = path.absolute()
        self._lock = Path(os.path.realpath(path) + ".lock")  # the same by whatever name or link
        self._timeout = timeout
        self._writer: aiosqlite.Connection
        self._reader: aiosqlite.Connection
        # Of the transaction that each of the two is in.
        self._writing = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()

    async def open(self) -> None:
        """Open the file, and bring it to the version that this program writes.

        Raises:
            ConfigError: it cannot be opened or written, is no database, is of a later version or
                another program, or belongs to another server that runs.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                if self._path.is_dir():
                    raise ConfigError(f"store: {self._path} is a folder")
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._take(stack)
                # For its owner's eyes only, as are the files that SQLite puts beside it.
                self._path.touch(mode=0o600)
                # Where that fails, aiosqlite would leave its thread behind.
                sqlite3.connect(self._path).close()
                self._writer = await self._connect(stack)
                await self._migrate()
                await self._bury()
                self._reader = await self._connect(stack)
            except (OSError, ValueError, sqlite3.Error) as error:
                raise ConfigError(f"store: cannot use {self._path}: {error}") from error
            self._stack = stack.pop_all()

    def _take(self, stack: contextlib.AsyncExitStack) -> None:
        # Two servers on one file would each take the other's generations for dead ones. The lock
        # is on a file of its own, as closing the database's would drop SQLite's own locks. It is
        # left behind, as another server may be about to take it.
        lock = stack.enter_context(self._lock.open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"store: another server uses {self._path}") from None

    async def _connect(self, stack: contextlib.AsyncExitStack) -> aiosqlite.Connection:
        database = await stack.enter_async_context(
            aiosqlite.connect(self._path, isolation_level=None, timeout=self._timeout)
        )
        await database.execute("PRAGMA synchronous = NORMAL")
        await database.execute("PRAGMA foreign_keys = ON")
        return database

    async def _migrate(self) -> None:
        ((version, tables),) = await self._writer.execute_fetchall(
            "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        )
        if version > len(MIGRATIONS):
            raise ConfigError(f"store: {self._path} is of a later version of this program")
        if version < 0 or (version == 0 and tables):
            raise ConfigError(f"store: {self._path} is of another program")
        await self._writer.execute_fetchall("PRAGMA journal_mode = WAL")
        # Where there is nothing to migrate too, to know now whether the file can be written.
        script = "".join(MIGRATIONS[version:])
        # With foreign keys, to replace a table would be to delete all that refers to it.
        await self._writer.executescript(
            f"PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; {script} "
            f"PRAGMA user_version = {len(MIGRATIONS)}; COMMIT; PRAGMA foreign_keys = ON;"
        )

    async def _bury(self) -> None:
        """End what died with its process: its replay time begins now, and what it said counts."""
        now = time.time()
        counts = []
        for number, *key in await self._writer.execute_fetchall(
            "SELECT number, owner, id, began FROM generation WHERE ended IS NULL"
        ):
            # One that is damaged is not in the way of all others.
            with contextlib.suppress(StoreError), _errors():
                parts = await self._writer.execute_fetchall(
                    "SELECT after, texts FROM piece WHERE generation = ? ORDER BY after", (number,)
                )
                counts.append((*key, day_of(now), tokens_in(sum(map(len, _pieces(parts))))))
        # Should this process die in between, the next one counts none of them twice.
        await self._writer.executemany(_COUNT, counts)
        await self._writer.execute(_BURY, (now,))

    async def close(self) -> None:
        """Close the file, once what is under way is done."""
        async with self._writing, self._reading:
            with _errors():
                await self._stack.aclose()

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all of it or nothing, in one transaction."""
        now = time.time()
        new = [entry.header for entry in entries if entry.new]
        in_conversations = [header for header in new if header.conversation is not None]
        async with self._write() as database:
            await database.executemany(
                "INSERT INTO conversation VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                [
                    (header.owner, header.conversation, title_of(header.prompt), now, now)
                    for header in in_conversations
                ],
            )
            await database.executemany(
                "INSERT INTO generation (owner, id, began, prompt, model, conversation, turn) "
                "VALUES (?, ?, ?, ?, ?, ?, CASE WHEN ? THEN (SELECT coalesce(max(turn), 0) + 1 "
                "FROM generation WHERE owner = ? AND conversation = ?) END) "
                "ON CONFLICT (owner, id, began) DO NOTHING",
                [
                    (
                        *_key(header),
                        header.prompt.model_dump_json(exclude_none=True),
                        header.model,
                        header.conversation,
                        header.conversation is not None,
                        header.owner,
                        header.conversation,
                    )
                    for header in new
                ],
            )
            # Where a conversation was deleted meanwhile there is no number, and nothing to add to.
            await database.executemany(
                "INSERT INTO piece SELECT number, ?, ? FROM generation "
                "WHERE owner = ? AND id = ? AND began = ? ON CONFLICT (generation, after) "
                "DO UPDATE SET texts = excluded.texts WHERE length(excluded.texts) > length(texts)",
                [
                    (entry.after, _dump(entry.pieces), *_key(entry.header))
                    for entry in entries
                    if entry.pieces
                ],
            )
            await database.executemany(
                "UPDATE generation SET terminal = ?, text = ?, ended = ? "
                "WHERE owner = ? AND id = ? AND began = ?",
                [
                    (
                        entry.terminal.model_dump_json(exclude_none=True),
                        entry.text,
                        now,
                        *_key(entry.header),
                    )
                    for entry in entries
                    if entry.terminal is not None
                ],
            )
            await database.executemany(
                _COUNT,
                [
                    (*_key(entry.header), day_of(now), tokens_of(entry.terminal))
                    for entry in entries
                    if entry.terminal is not None
                ],
            )
            await database.executemany(
                "UPDATE conversation SET updated = ? WHERE owner = ? AND id = ?",
                {
                    (now, entry.header.owner, entry.header.conversation)
                    for entry in entries
                    if entry.new or entry.terminal is not None
                },
            )

    async def find(self, generation: str, owner: str, since: float) -> StoredGeneration | None:
        """Return an owner's latest generation of that id, unless it ended before a time."""
        async with self._read() as database:
            rows = await database.execute_fetchall(
                "SELECT * FROM (SELECT number, conversation, prompt, model, began, terminal, ended "
                "FROM generation WHERE owner = ? AND id = ? ORDER BY number DESC LIMIT 1) "
                "WHERE ended IS NULL OR ended >= ?",
                (owner, generation, since),
            )
            for number, conversation, prompt, model, began, terminal, _ in rows:
                parts = await database.execute_fetchall(
                    "SELECT after, texts FROM piece WHERE generation = ? ORDER BY after", (number,)
                )
                parsed = Prompt.model_validate_json(prompt)
                header = Header(generation, owner, conversation, parsed, model, began)
                return StoredGeneration(header, _pieces(parts), _terminal(terminal))
        return None

    async def load(
        self, conversation: str, owner: str, limit: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number."""
        end = MAX_NUMBER if before is None else max(0, min(before, MAX_NUMBER))
        async with self._read() as database:
            rows = await database.execute_fetchall(
                "SELECT title FROM conversation WHERE owner = ? AND id = ?", (owner, conversation)
            )
            for (title,) in rows:
                generations = await database.execute_fetchall(
                    "SELECT number, turn, id, prompt, terminal, text FROM generation "
                    "WHERE number IN (SELECT number FROM generation WHERE owner = ? "
                    "AND conversation = ? AND turn < ? ORDER BY turn DESC LIMIT ?) ORDER BY turn",
                    (owner, conversation, end, limit),
                )
                # By themselves, as in one row each a long prompt would be read with every piece.
                parts: dict[int, list[object]] = defaultdict(list)
                for number, *part in await database.execute_fetchall(
                    "SELECT generation, after, texts FROM piece WHERE generation IN ("
                    "SELECT number FROM generation WHERE owner = ? AND conversation = ? "
                    "AND turn < ? AND text IS NULL ORDER BY turn DESC LIMIT ?) "
                    "ORDER BY generation, after",
                    (owner, conversation, end, limit),
                ):
                    parts[number].append(part)
                turns = [
                    Turn(
                        turn,
                        name,
                        Prompt.model_validate_json(prompt).prompt or "",
                        text_of(_pieces(parts[number])) if text is None else text,
                        partial(_terminal(terminal)),
                    )
                    for number, turn, name, prompt, terminal, text in generations
                ]
                return StoredConversation(conversation, owner, title, turns)
        return None

    async def list(
        self, owner: str, limit: int, before: tuple[float, str] | None
    ) -> Sequence[Summary]:
        """Return an owner's conversations, newest first."""
        async with self._read() as database:
            rows = await database.execute_fetchall(
                "SELECT id, title, created, updated FROM conversation "
                "WHERE owner = ? AND (updated, id) < (?, ?) ORDER BY updated DESC, id DESC LIMIT ?",
                (owner, *(before or (float("inf"), "")), limit),
            )
        return [Summary(*row) for row in rows]

    async def rename(self, conversation: str, owner: str, title: str) -> bool:
        """Give a conversation another title."""
        return await self._change(
            "UPDATE conversation SET title = ? WHERE owner = ? AND id = ?",
            (title, owner, conversation),
        )

    async def delete(self, conversation: str, owner: str) -> bool:
        """Delete a conversation and all in it."""
        return await self._change(
            "DELETE FROM conversation WHERE owner = ? AND id = ?", (owner, conversation)
        )

    async def spent(self, owner: str, day: int) -> int:
        """Return the tokens of an owner's replies that ended on a day."""
        async with self._read() as database:
            ((tokens,),) = await database.execute_fetchall(
                "SELECT CAST(total(tokens) AS INTEGER) FROM spent WHERE owner = ? AND day = ?",
                (owner, day),
            )
        return int(tokens)

    async def purge(self, until: float) -> None:
        """Delete generations outside of conversations that ended before a time, or some of them.

        Accounts are kept for 90 days; which replies are in them, for today and yesterday.
        """
        today = day_of(time.time())
        async with self._write() as database:
            await database.execute(
                "DELETE FROM generation WHERE number IN (SELECT number FROM generation "
                "WHERE conversation IS NULL AND ended < ? LIMIT ?)",
                (until, PURGED_AT_ONCE),
            )
            await database.execute(
                "DELETE FROM counted WHERE (owner, id, began) IN (SELECT owner, id, began "
                "FROM counted WHERE day < ? LIMIT ?)",
                (today - 1, PURGED_AT_ONCE),
            )
            await database.execute(
                "DELETE FROM spent WHERE (owner, day) IN (SELECT owner, day "
                "FROM spent WHERE day < ? LIMIT ?)",
                (today - DAYS_KEPT, PURGED_AT_ONCE),
            )

    async def _change(self, statement: str, values: Sequence[object]) -> bool:
        async with self._write() as database:
            cursor = await database.execute(statement, values)
            return cursor.rowcount > 0

    @contextlib.asynccontextmanager
    async def _read(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._reading, _transaction(self._reader, "BEGIN"):
            yield self._reader

    @contextlib.asynccontextmanager
    async def _write(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._writing, _transaction(self._writer, "BEGIN IMMEDIATE"):
            yield self._writer


@contextlib.asynccontextmanager
async def _transaction(database: aiosqlite.Connection, begin: str) -> AsyncIterator[None]:
    with _errors():
        try:
            await database.execute(begin)
            yield
            await database.execute("COMMIT")
        except BaseException:
            # Even where it was cancelled before it began, as the thread does not know of that.
            with contextlib.suppress(sqlite3.Error, ValueError):
                await database.execute("ROLLBACK")
            raise


def _key(header: Header) -> tuple[str, str, float]:
    return header.owner, header.id, header.began


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    # No message may quote what was said, as it goes to the log.
    except ValidationError as error:
        kind = error.errors(include_context=False, include_input=False)[0]["type"]
        raise StoreError(f"what was saved is damaged: {kind}") from None
    except (sqlite3.Error, ValueError) as error:  # a ValueError too where it is closed
        message = str(error).partition(" with text ")[0]
        raise StoreError(f"{type(error).__name__}: {message}") from None


def _dump(pieces: Sequence[str]) -> str:
    return json.dumps(
        [[piece] if type(piece) is Thinking else piece for piece in pieces], ensure_ascii=False
    )


def _pieces(parts: object) -> list[str]:
    pieces: list[str] = []
    for after, part in _PARTS.validate_python(parts):
        pieces[after : after + len(part)] = [
            piece if isinstance(piece, str) else Thinking(piece[0]) for piece in part
        ]
    return pieces


def _terminal(json_text: str | None) -> Terminal | None:
    return None if json_text is None else _TERMINAL.validate_json(json_text)
