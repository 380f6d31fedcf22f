"""The store in a SQLite file, with one writer and one reader outside of the event loop.

The writer and the reader are connections, each with a thread of its own. A call of the store runs
one function there, in one transaction. A cancelled call cannot leave a transaction open.

The file is in WAL mode with ``synchronous = NORMAL``. Committed data survives the death of the
process. After a power failure the file is consistent, but may lack the last commits.
https://www.sqlite.org/wal.html

Deleted data is overwritten with zeros (``secure_delete``). The WAL may still have it, and is
truncated. Blocks that the file system has freed cannot be overwritten.
"""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from wsserver.errors import ConfigError, StoreError, StoreInUse
from wsserver.logs import log
from wsserver.prices import NOTHING, Prices, Spent
from wsserver.stores.base import (
    TRACE_KEPT,
    TRACES,
    Amounts,
    Entry,
    Forgotten,
    StoredConversation,
    StoredGeneration,
    Summary,
    Unsavable,
    day_of,
)
from wsserver.stores.database import Connection, check, errors, files_of, identity
from wsserver.stores.fair import FairLock
from wsserver.stores.migrations import MIGRATIONS
from wsserver.stores.reads import find, load, read_batches
from wsserver.stores.rows import COUNT, pack, save
from wsserver.text import tokens_in

T = TypeVar("T")

PURGED_AT_ONCE = 200  # rows of each kind per step, so that other writes do not wait long
DELETED_AT_ONCE = 4_194_304  # bytes of generations per step, for the same reason
CHECKED_AT_ONCE = 134_217_728  # bytes; a larger file is checked in the background
DAYS_KEPT = 90  # days for which spending is kept
MAX_NUMBER = 2**63 - 1  # SQLite's largest integer

# Errors about values, and not about the file or its state.
_UNSAVABLE = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError)
_OLD_TRACES = """
    DELETE FROM forgotten WHERE (owner, id) IN
    (SELECT owner, id FROM forgotten WHERE at < ? LIMIT ?)
"""
_OLD_COUNTED = """
    DELETE FROM counted WHERE (owner, id, began) IN
    (SELECT owner, id, began FROM counted WHERE day < ? LIMIT ?)
"""
_OLD_SPENT = """
    DELETE FROM spent WHERE (owner, day) IN (SELECT owner, day FROM spent WHERE day < ? LIMIT ?)
"""
_DEAD = (
    "SELECT number, owner, id, began, model FROM generation WHERE lengths IS NULL AND ended IS NULL"
)


class SqliteStore:
    """Stores conversations and generations in one file. Creates the file and its folders.

    Args:
        path: the file.
        timeout: seconds to wait for a lock of another program on the file.
        prices: the prices of the models; by default those of Claude.
    """

    def __init__(self, path: Path, timeout: float = 5.0, prices: Prices | None = None) -> None:
        self._path = path.absolute()
        self._prices = prices or Prices()
        self._lock_path = Path(os.path.realpath(path) + ".lock")  # by whatever name or link
        self._timeout = timeout
        self._lock: IO[str] | None = None
        self._writer: Connection | None = None
        self._reader: Connection | None = None
        self._writing = FairLock()
        self._reading = FairLock()
        self._files: dict[str, tuple[int, int]] = {}  # identities by path
        self._damage: str | None = None  # found by the check of a large file
        self._remains = False  # the WAL may have deleted text
        self._erasing: asyncio.Task[None] | None = None  # truncates the WAL soon
        self._compacted = 0  # the number up to which pieces of older versions were packed

    async def open(self) -> None:
        """Open the file, check it, and migrate it to the schema of this version.

        A file of more than 128 MiB is checked in the background.

        Raises:
            ConfigError: the file cannot be opened or written; it is not a database, damaged, of a
                later version or of another program; or another server uses it.
        """
        writer = Connection(self._path, self._timeout)
        reader = Connection(self._path, self._timeout)
        lock = None
        try:
            if self._path.is_dir():
                raise ConfigError(f"store: {self._path} is a folder")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._lock_file()
            # Only the owner can read the file. SQLite gives its other files the same mode.
            self._path.touch(mode=0o600)
            await writer.open()
            large = self._path.stat().st_size > CHECKED_AT_ONCE
            if not large and (damage := await writer.call(check)) is not None:
                raise ConfigError(
                    f"store: {self._path} is damaged ({damage}); restore a copy of it, or save "
                    "what can be saved with sqlite3's .recover"
                )
            await writer.call(self._migrate)
            await writer.transact(self._mark_interrupted)
            await reader.open()
            files = await reader.call(files_of)
        except BaseException as error:
            reader.close()
            writer.close()
            if lock is not None:
                lock.close()
            if isinstance(error, OSError | ValueError | sqlite3.Error | StoreError):
                raise ConfigError(f"store: cannot use {self._path}: {error}") from error
            raise
        self._writer, self._reader, self._lock = writer, reader, lock
        self._files, self._damage = files, None
        if large:
            loop = asyncio.get_running_loop()
            # A daemon thread, because the interpreter would wait for other threads at its end.
            threading.Thread(
                target=self._check_large, args=(loop,), name="wsserver-store-check", daemon=True
            ).start()

    def _check_large(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            with contextlib.closing(sqlite3.connect(self._path)) as database:
                damage = check(database)
        except sqlite3.Error as error:
            damage = str(error)
        if damage is not None:
            self._damage = damage
            with contextlib.suppress(RuntimeError):  # the event loop is gone by now
                loop.call_soon_threadsafe(self._log_damage)

    def _log_damage(self) -> None:
        log.error("store damaged", path=str(self._path), reason=self._damage)

    def _lock_file(self) -> IO[str]:
        # Two servers on one file would mark each other's generations as interrupted. The lock is on
        # a separate file, because closing the database file would drop SQLite's locks.
        # The lock file is not deleted: another server may be about to lock it.
        lock = self._lock_path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StoreInUse(
                f"store: another server uses {self._path}; stop that server, or start this one "
                "with another --port and another file (--store sqlite:///PATH) or none "
                "(--store memory:)"
            ) from None
        return lock

    def _migrate(self, database: sqlite3.Connection) -> None:
        ((version, tables),) = database.execute(
            "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        )
        if version > len(MIGRATIONS):
            raise ConfigError(f"store: {self._path} is of a later version of this program")
        if version < 0 or (version == 0 and tables):
            raise ConfigError(f"store: {self._path} is of another program")
        database.execute("PRAGMA journal_mode = WAL")
        # This also runs without a migration, to check that the file can be written.
        script = "".join(MIGRATIONS[version:])
        # With foreign keys, replacing a table would delete all rows that refer to it.
        database.executescript(
            f"PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; {script} "
            f"PRAGMA user_version = {len(MIGRATIONS)}; COMMIT; PRAGMA foreign_keys = ON;"
        )

    @property
    def writer(self) -> Connection:
        """The connection that writes, for example to back up the file.

        Raises:
            StoreError: the store is closed.
        """
        return _opened(self._writer)

    @property
    def reader(self) -> Connection:
        """The connection that reads.

        Raises:
            StoreError: the store is closed.
        """
        return _opened(self._reader)

    async def probe(self) -> None:
        """Write the schema version that the file already has, if no file was replaced."""
        await self._write(
            "", lambda database: database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        )
        for connection in (self._writer, self._reader):
            if connection is not None and connection.damage is not None:
                raise StoreError(f"the file is damaged: {connection.damage}")
        if self._damage is not None:
            raise StoreError(f"the file is damaged: {self._damage}")

    def _mark_interrupted(self, database: sqlite3.Connection) -> None:
        """End the generations that the last process left running, and count their cost."""
        now = self.now()
        for number, owner, name, began, model in database.execute(_DEAD).fetchall():
            text = ""
            # A damaged generation must not prevent the start.
            with contextlib.suppress(StoreError), errors():
                pieces = read_batches(database, number)
                pack(database, number, pieces)
                text = "".join(pieces.data)
            database.execute("UPDATE generation SET ended = ? WHERE number = ?", (now, number))
            spent = self._prices.of(model).highest(0, tokens_in(text))
            database.execute(COUNT, (owner, name, began, day_of(now), *spent))
        for owner, name in database.execute("SELECT owner, id FROM deleting").fetchall():
            while _delete_some(database, owner, name):
                pass

    def now(self) -> float:
        """Return the time of this machine, in seconds since the epoch."""
        return time.time()

    async def close(self) -> None:
        """Close the file after all running calls. Idempotent."""
        async with self._writing.of(""), self._reading.of(""):
            for connection in (self._reader, self._writer):
                if connection is not None:
                    await asyncio.shield(connection.close())
            if self._lock is not None:
                self._lock.close()
            self._reader = self._writer = self._lock = None

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all entries or none, in one transaction."""
        now = self.now()

        def commit(database: sqlite3.Connection) -> None:
            for entry in entries:
                try:
                    save(database, entry, now, self._prices)
                except (ArithmeticError, ValueError, *_UNSAVABLE) as error:
                    raise Unsavable(entry, type(error).__name__) from None

        await self._write("", commit)

    async def find(self, owner: str, generation: str) -> StoredGeneration | Forgotten | None:
        """Return an owner's latest generation of that id, or its trace."""
        return await self._read(owner, lambda database: find(database, owner, generation))

    async def load(
        self, owner: str, conversation: str, *, limit: int, size: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number."""
        bounds = limit, size, _end(before)
        return await self._read(owner, lambda file: load(file, owner, conversation, bounds))

    async def list(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, the one used last first."""
        rows = await self._select(
            owner,
            "SELECT id, title, created, updated, place FROM conversation WHERE owner = ? "
            "AND place < ? AND (owner, id) NOT IN deleting ORDER BY place DESC LIMIT ?",
            (owner, _end(before), limit),
        )
        return [Summary(*row) for row in rows]

    async def rename(self, owner: str, conversation: str, title: str) -> bool:
        """Change the title of a conversation."""
        statement = "UPDATE conversation SET title = ? WHERE owner = ? AND id = ?"
        values = title, owner, conversation
        return await self._write(owner, lambda file: file.execute(statement, values).rowcount > 0)

    async def delete(self, owner: str, conversation: str, before: float | None = None) -> bool:
        """Delete a conversation and its generations."""
        now = self.now()
        key = owner, conversation

        def start(database: sqlite3.Connection) -> bool | None:
            known = (
                "SELECT 1 FROM conversation WHERE owner = ? AND id = ? "
                "AND (? IS NULL OR updated < ?)"
            )
            if database.execute(known, (*key, before, before)).fetchone() is None:
                return None
            database.execute(
                "INSERT INTO forgotten SELECT owner, id, ? FROM generation WHERE owner = ? "
                "AND conversation = ? ORDER BY turn DESC LIMIT ? "
                "ON CONFLICT (owner, id) DO UPDATE SET at = excluded.at",
                (now, *key, TRACES),
            )
            _drop_traces(database, owner)
            # If the process dies before the last step, the next process continues.
            database.execute("INSERT INTO deleting VALUES (?, ?) ON CONFLICT DO NOTHING", key)
            return _delete_some(database, *key)

        more = await self._write(owner, start)
        if more is None:
            return False
        while more:
            more = await self._write(owner, lambda database: _delete_some(database, *key))
        await self._erase()
        return True

    async def _erase(self) -> None:
        """Truncate the WAL, which may have text that was deleted from the tables.

        Deletes at the same time share one truncation: a commit then waits for one truncation, and
        not for one per delete.
        """
        self._remains = True
        if self._erasing is None:
            self._erasing = asyncio.get_running_loop().create_task(self._checkpoint())
            self._erasing.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._erasing)

    async def _checkpoint(self) -> None:
        def erase(database: sqlite3.Connection) -> bool:
            # Do not wait for another program that reads the file: all requests would wait too. The
            # next purge tries again.
            database.execute("PRAGMA busy_timeout = 0").close()
            try:
                ((busy, _, _),) = database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:
                return False
            finally:
                database.execute(f"PRAGMA busy_timeout = {round(self._timeout * 1000)}").close()
            return not busy

        # Not during a read, whose snapshot must stay in the WAL.
        async with self._writing.of(""), self._reading.of(""):
            self._erasing = None
            if await self.writer.call(erase):
                self._remains = False

    async def spent(self, owner: str, day: int) -> Spent:
        """Return the cost of an owner's replies that ended on a day."""
        statement = "SELECT tokens, microdollars FROM spent WHERE owner = ? AND day = ?"
        rows = await self._select(owner, statement, (owner, day))
        return Spent(*rows[0]) if rows else NOTHING

    async def amounts(self, owner: str) -> Amounts:
        """Return how much an owner has stored."""
        statement = "SELECT bytes, conversations FROM held WHERE owner = ?"
        rows = await self._select(owner, statement, (owner,))
        return Amounts(*rows[0]) if rows else Amounts(0, 0)

    async def idle(self, before: float, limit: int) -> Sequence[tuple[str, str]]:
        """Return the owners and ids of some conversations that were last used before a time."""
        statement = "SELECT owner, id FROM conversation WHERE updated < ? ORDER BY updated LIMIT ?"
        return await self._select("", statement, (before, limit))

    async def purge(self, until: float) -> bool:
        """Delete some expired generations, traces and records of spending.

        The spending of a day is kept for 90 days, and the list of its replies for two.
        """
        now = self.now()
        today = day_of(now)

        def purge(database: sqlite3.Connection) -> tuple[bool, bool]:
            ended = database.execute(
                "SELECT number, owner, id FROM generation WHERE conversation IS NULL "
                "AND ended < ? LIMIT ?",
                (until, PURGED_AT_ONCE),
            ).fetchall()
            for number, owner, name in ended:
                database.execute(
                    "INSERT INTO forgotten VALUES (?, ?, ?) "
                    "ON CONFLICT (owner, id) DO UPDATE SET at = excluded.at",
                    (owner, name, now),
                )
                database.execute("DELETE FROM generation WHERE number = ?", (number,))
            for owner in {owner for _, owner, _ in ended}:
                _drop_traces(database, owner)
            counts = [len(ended), self._compact(database)]
            for statement, end in (
                (_OLD_TRACES, now - TRACE_KEPT),
                (_OLD_COUNTED, today - 1),
                (_OLD_SPENT, today - DAYS_KEPT),
            ):
                counts.append(database.execute(statement, (end, PURGED_AT_ONCE)).rowcount)
            return PURGED_AT_ONCE in counts, bool(ended)

        more, deleted = await self._write("", purge)
        self._remains = self._remains or deleted
        if self._remains and not more:
            await self._erase()
        return more

    def _compact(self, database: sqlite3.Connection) -> int:
        """Pack some of the replies whose pieces an older version left in rows.

        Returns:
            The number of replies tried.
        """
        older = database.execute(
            "SELECT number FROM generation WHERE lengths IS NULL AND ended IS NOT NULL "
            "AND number > ? ORDER BY number LIMIT ?",
            (self._compacted, PURGED_AT_ONCE),
        ).fetchall()
        for (number,) in older:
            self._compacted = number
            with contextlib.suppress(StoreError), errors():  # a damaged reply stays in rows
                pack(database, number, read_batches(database, number))
        return len(older)

    async def _read(self, owner: str, work: "Callable[[sqlite3.Connection], T]") -> T:
        async with self._reading.of(owner):
            return await self.reader.transact(work, "BEGIN")

    async def _select(self, owner: str, statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        return await self._read(owner, lambda file: file.execute(statement, values).fetchall())

    async def _write(self, owner: str, work: "Callable[[sqlite3.Connection], T]") -> T:
        def write(database: sqlite3.Connection) -> T:
            # A write to a deleted file would be lost with the process.
            for path, known in self._files.items():
                if identity(path) != known:
                    raise StoreError(f"{path} was deleted or replaced while it was in use")
            return work(database)

        async with self._writing.of(owner):
            return await self.writer.transact(write)


def _delete_some(database: sqlite3.Connection, owner: str, conversation: str) -> bool:
    """Delete the oldest turns of a conversation, and then itself. Return whether any are left."""
    size = 0
    for number, bytes_ in database.execute(
        "SELECT number, size + rest FROM generation WHERE owner = ? AND conversation = ? "
        "ORDER BY turn LIMIT ?",
        (owner, conversation, PURGED_AT_ONCE),
    ).fetchall():
        database.execute("DELETE FROM generation WHERE number = ?", (number,))
        size += bytes_
        if size >= DELETED_AT_ONCE:
            break
    left = "SELECT 1 FROM generation WHERE owner = ? AND conversation = ? LIMIT 1"
    if database.execute(left, (owner, conversation)).fetchone() is not None:
        return True
    database.execute("DELETE FROM conversation WHERE owner = ? AND id = ?", (owner, conversation))
    return False


def _end(before: int | None) -> int:
    """Return the number before which rows are read. A client may send any number."""
    return MAX_NUMBER if before is None else max(0, min(before, MAX_NUMBER))


def _opened(connection: Connection | None) -> Connection:
    if connection is None:
        raise StoreError("the store is closed")
    return connection


def _drop_traces(database: sqlite3.Connection, owner: str) -> None:
    """Drop the oldest traces of an owner, beyond the number that is kept."""
    database.execute(
        "DELETE FROM forgotten WHERE owner = ? AND id IN (SELECT id FROM forgotten "
        "WHERE owner = ? ORDER BY at DESC LIMIT -1 OFFSET ?)",
        (owner, owner, TRACES),
    )
