"""The store in PostgreSQL, through asyncpg.

Each call is one statement or one short transaction, prepared on the connections of a pool. A batch
of the journal is one statement, whatever its number of replies.

One server, or the nodes of one cluster, use the tables at a time: each holds an advisory lock for
as long as it runs, and only nodes share the lock. After a restart of the database the store
connects again by itself.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg

from wsserver.errors import MALFORMED_ADDRESS, ConfigError, StoreError
from wsserver.pieces import Pieces
from wsserver.prices import NOTHING, Prices, Spent
from wsserver.stores.base import (
    TRACE_KEPT,
    TRACES,
    Amounts,
    Entry,
    Fenced,
    Forgotten,
    StoredConversation,
    StoredGeneration,
    Summary,
    Unsavable,
    day_of,
)
from wsserver.stores.fair import FairLock
from wsserver.stores.postgres.failures import FAILURES, UNSAVABLE, reason_of
from wsserver.stores.postgres.guard import Guard
from wsserver.stores.postgres.rows import (
    FIND,
    LOAD,
    LOCK_OWNERS,
    PIECES,
    SAVE,
    columns_of,
    found,
    loaded,
    pieces_of,
    row_of,
)
from wsserver.stores.postgres.schema import migrate
from wsserver.text import tokens_in

CONNECTIONS = 4  # for requests; the journal has one more
SCHEMA = "wsserver"
ADDRESS = ("postgresql://", "postgres://")  # beginnings of an address
PURGED_AT_ONCE = 200  # rows of each kind per step, so that its locks are short
DAYS_KEPT = 90  # days for which spending is kept
MINUTE = 60.0  # seconds in which every key has all its prompts of a minute again
MAX_NUMBER = 2**63 - 1  # PostgreSQL's largest integer

_TRACE = (
    "INSERT INTO forgotten SELECT owner, id, $1 FROM ({}) AS gone GROUP BY owner, id "
    "ON CONFLICT (owner, id) DO UPDATE SET at = excluded.at"
)
_OLD_TRACES = (
    "DELETE FROM forgotten WHERE owner = $1 AND id IN "
    "(SELECT id FROM forgotten WHERE owner = $1 ORDER BY at DESC OFFSET $2)"
)
_EXPIRED = [  # statements that delete some expired rows, each with the time or day of its bound
    "DELETE FROM forgotten WHERE ctid IN (SELECT ctid FROM forgotten WHERE at < $1 LIMIT $2)",
    "DELETE FROM counted WHERE ctid IN (SELECT ctid FROM counted WHERE day < $1 LIMIT $2)",
    "DELETE FROM spent WHERE ctid IN (SELECT ctid FROM spent WHERE day < $1 LIMIT $2)",
    "DELETE FROM allowed WHERE ctid IN (SELECT ctid FROM allowed WHERE at < $1 LIMIT $2)",
]


class PostgresStore:
    """Stores conversations and generations in a PostgreSQL database. Creates its tables.

    Args:
        url: the address, as libpq and asyncpg read it: ``postgresql://USER@HOST/DATABASE``. Parts
            that are left out come from the environment (``PGHOST``, ``PGPASSWORD``, …).
            ``?search_path=NAME`` names another schema than ``wsserver``.
        timeout: seconds for one statement.
        prices: the prices of the models; by default those of Claude.
        copying: open the tables although a copy into them is not complete.
        node: the id of this node of a cluster, which shares the tables with other nodes; None for a
            server that has them alone. A node that was buried takes another id.

    Raises:
        ValueError: the address is malformed.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 5.0,
        prices: Prices | None = None,
        *,
        copying: bool = False,
        node: str | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ValueError(MALFORMED_ADDRESS) from None
        self._url = url
        self._place = f"{parts.hostname or 'the default host'}{parts.path}"  # without the password
        (schema,) = parse_qs(parts.query).get("search_path", [SCHEMA])[-1:]
        if not re.fullmatch("[a-z_][a-z0-9_]*", schema):
            raise ValueError("search_path is not the name of a schema in lower case")
        self._timeout = timeout
        self._copying = copying
        self.node = node
        self._settings = {
            "search_path": schema,
            "application_name": "wsserver",
            # The locks of a node that was paused within a transaction must not stop the others.
            "idle_in_transaction_session_timeout": str(int(timeout * 1000)),
        }
        self._prices = prices or Prices()
        self._pool: Any = None
        self._guard = Guard(
            self._connect, shared=node is not None, place=self._place, failures=FAILURES
        )
        self._places = FairLock(CONNECTIONS)
        self._ahead = 0.0  # seconds by which the clock of the database is ahead of this machine's

    # Opening and closing.

    async def open(self) -> None:
        """Connect, and migrate the tables to the schema of this version.

        Raises:
            ConfigError: the database cannot be used, its tables are of a later version, or another
                server uses them.
        """
        try:
            first = await self._connect()
            try:
                await migrate(first)
                if self.node is not None:
                    await self.set_clock(first)
                unfinished = await first.fetchval("SELECT to_regclass('copying') IS NOT NULL")
            except BaseException:
                await first.close()
                raise
            await self._guard.take(first)
            if unfinished and not self._copying:
                raise ConfigError(
                    f"store: a copy into {self._place} is not complete; run "
                    "`wsserver store copy` again"
                )
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=1,
                max_size=CONNECTIONS + 1,
                command_timeout=self._timeout,
                timeout=self._timeout,
                server_settings=self._settings,
                reset=_keep,
            )
            if not self._copying and self.node is None:
                await self.end_replies(None)
        except BaseException as error:
            await self.close()
            if isinstance(error, (*FAILURES, StoreError)):
                reason = str(error) if isinstance(error, StoreError) else reason_of(error)
                raise ConfigError(f"store: cannot use {self._place}: {reason}") from error
            if isinstance(error, ValueError):  # it has parts of the address, as the place has
                raise ConfigError(f"store: {MALFORMED_ADDRESS}") from None
            raise

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(self._timeout):
                    await pool.close()
            except FAILURES:
                pool.terminate()
        await self._guard.release(self._timeout)

    async def _connect(self) -> Any:
        return await asyncpg.connect(
            self._url,
            timeout=self._timeout,
            command_timeout=self._timeout,
            server_settings=self._settings,
        )

    def now(self) -> float:
        """Return the time in seconds since the epoch: of the database, if nodes share it.

        The clocks of the nodes may differ. A clock that is ahead must not make its node delete what
        has not expired.
        """
        return time.time() + self._ahead

    async def set_clock(self, connection: Any) -> None:
        """Compare the clock of this machine with the clock of the database."""
        asked = time.time()
        now = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        self._ahead = now - (asked + time.time()) / 2

    async def end_replies(self, node: str | None) -> None:
        """End the generations that a dead node left running, and count their cost.

        Args:
            node: the id of the node; None for all generations.

        Raises:
            StoreError: the database cannot be used now.
        """
        now = self.now()
        async with self.connection() as connection, connection.transaction():
            dead = await connection.fetch(
                "SELECT number, owner, id, began, model FROM generation "
                "WHERE ended IS NULL AND ($1::text IS NULL OR node = $1) FOR UPDATE",
                node,
            )
            await connection.execute(LOCK_OWNERS, [row["owner"] for row in dead])
            for row in dead:
                key = row["owner"], row["id"], row["began"]
                text = ""
                with contextlib.suppress(ValueError):  # damage must not prevent the start
                    pieces = pieces_of(await connection.fetchrow(PIECES, *key))
                    text = "".join(pieces.data)
                spent = self._prices.of(row["model"]).highest(0, tokens_in(text))
                await connection.execute(
                    "UPDATE generation SET ended = $2 WHERE number = $1", row["number"], now
                )
                spend = "SELECT spend($1, $2, $3, $4, $5, $6)"
                await connection.execute(spend, *key, day_of(now), *spent)

    # Writing.

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all entries or none, in one statement unless a reply lacks its first pieces."""
        if not entries:
            return
        now = self.now()
        try:
            async with self.connection() as connection:
                await self._commit(connection, entries, now)
        except StoreError as error:
            if isinstance(error.__cause__, UNSAVABLE):
                await self._find_unsavable(entries, now)
            raise

    async def _commit(self, connection: Any, entries: Sequence[Entry], now: float) -> None:
        if all(map(_is_whole, entries)):
            await self._save(connection, entries, now)
            return
        async with connection.transaction():
            for entry in entries:  # one may have the first pieces of another
                whole = entry if _is_whole(entry) else await _joined(connection, entry)
                await self._save(connection, [whole], now)

    async def _save(self, connection: Any, entries: Sequence[Entry], now: float) -> None:
        if not _rows(await connection.execute(SAVE, *self._columns(entries, now))):
            raise Fenced("the other nodes of the cluster have ended the replies of this node")

    def _columns(self, entries: Sequence[Entry], now: float) -> list[Any]:
        rows = []
        for entry in entries:
            try:
                rows.append(row_of(entry, self._prices))
            except (ArithmeticError, ValueError) as error:
                raise Unsavable(entry, type(error).__name__) from None
        return columns_of(rows, now, self.node)

    async def _find_unsavable(self, entries: Sequence[Entry], now: float) -> None:
        """Find the entry that cannot be saved, without saving any.

        Raises:
            Unsavable: it was found.
        """
        for entry in entries:
            async with self.connection() as connection:
                attempt = connection.transaction()
                await attempt.start()
                try:
                    await self._commit(connection, [entry], now)
                except UNSAVABLE as error:
                    raise Unsavable(entry, type(error).__name__) from None
                finally:
                    await attempt.rollback()

    async def rename(self, owner: str, conversation: str, title: str) -> bool:
        """Change the title of a conversation."""
        statement = "UPDATE conversation SET title = $3 WHERE owner = $1 AND id = $2"
        async with self.request(owner) as connection:
            return (
                _rows(await connection.execute(statement, owner, conversation, title.encode())) > 0
            )

    async def delete(self, owner: str, conversation: str, before: float | None = None) -> bool:
        """Delete a conversation and its generations."""
        key, now = (owner, conversation), self.now()
        async with self.request(owner) as connection, connection.transaction():
            known = await connection.fetchrow(
                "SELECT FROM conversation WHERE owner = $1 AND id = $2 "
                "AND ($3::float8 IS NULL OR updated < $3) FOR UPDATE",
                *key,
                before,
            )
            if known is None:
                return False
            newest = (
                "SELECT owner, id FROM generation WHERE owner = $2 AND conversation = $3 "
                "ORDER BY turn DESC LIMIT $4"
            )
            await connection.execute(_TRACE.format(newest), now, *key, TRACES)
            await connection.execute(_OLD_TRACES, owner, TRACES)
            await connection.execute("DELETE FROM conversation WHERE owner = $1 AND id = $2", *key)
            return True

    async def purge(self, until: float) -> bool:
        """Delete some expired generations, traces and records of spending.

        The spending of a day is kept for 90 days, and the list of its replies for two.
        """
        now = self.now()
        bounds = now - TRACE_KEPT, day_of(now) - 1, day_of(now) - DAYS_KEPT, now - MINUTE
        async with self.request("") as connection, connection.transaction():
            gone = await connection.fetch(
                "DELETE FROM generation WHERE number IN (SELECT number FROM generation WHERE "
                "conversation IS NULL AND ended < $1 LIMIT $2) RETURNING owner, id",
                until,
                PURGED_AT_ONCE,
            )
            owners, names = [row["owner"] for row in gone], [row["id"] for row in gone]
            pairs = "SELECT * FROM unnest($2::text[], $3::text[]) AS each(owner, id)"
            await connection.execute(_TRACE.format(pairs), now, owners, names)
            for owner in sorted(set(owners)):
                await connection.execute(_OLD_TRACES, owner, TRACES)
            counts = [len(gone)]
            for statement, bound in zip(_EXPIRED, bounds, strict=True):
                counts.append(_rows(await connection.execute(statement, bound, PURGED_AT_ONCE)))
            return PURGED_AT_ONCE in counts

    async def probe(self) -> None:
        """Write the version that the tables already have."""
        async with self.request("") as connection:
            await connection.execute("UPDATE version SET number = number")

    # Reading.

    async def find(self, owner: str, generation: str) -> StoredGeneration | Forgotten | None:
        """Return an owner's latest generation of that id, or its trace."""
        async with self.request(owner) as connection:
            row = await connection.fetchrow(FIND, owner, generation)
            if row is not None:
                return found(row, owner)
            when = await connection.fetchval(
                "SELECT at FROM forgotten WHERE owner = $1 AND id = $2", owner, generation
            )
            return None if when is None else Forgotten(when)

    async def load(
        self, owner: str, conversation: str, *, limit: int, size: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number."""
        async with self.request(owner) as connection:
            rows = await connection.fetch(
                LOAD, owner, conversation, _end(before), limit, min(size, MAX_NUMBER)
            )
            return loaded(rows, owner, conversation) if rows else None

    async def list(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, the one used last first."""
        rows = await self._fetch(
            owner,
            "SELECT id, title, created, updated, place FROM conversation "
            "WHERE owner = $1 AND place < $2 ORDER BY place DESC LIMIT $3",
            owner,
            _end(before),
            limit,
        )
        return [Summary(name, title.decode(), *rest) for name, title, *rest in rows]

    async def spent(self, owner: str, day: int) -> Spent:
        """Return the cost of an owner's replies that ended on a day."""
        statement = "SELECT tokens, microdollars FROM spent WHERE owner = $1 AND day = $2"
        rows = await self._fetch(owner, statement, owner, day)
        return Spent(*rows[0]) if rows else NOTHING

    async def amounts(self, owner: str) -> Amounts:
        """Return how much an owner has stored."""
        statement = "SELECT bytes, conversations FROM held WHERE owner = $1"
        rows = await self._fetch(owner, statement, owner)
        return Amounts(*rows[0]) if rows else Amounts(0, 0)

    async def idle(self, before: float, limit: int) -> Sequence[tuple[str, str]]:
        """Return the owners and ids of some conversations that were last used before a time."""
        statement = (
            "SELECT owner, id FROM conversation WHERE updated < $1 ORDER BY updated LIMIT $2"
        )
        return [(owner, name) for owner, name in await self._fetch("", statement, before, limit)]

    # Connections.

    async def _fetch(self, owner: str, statement: str, *values: object) -> Sequence[Any]:
        async with self.request(owner) as connection:
            rows: Sequence[Any] = await connection.fetch(statement, *values)
            return rows

    @contextlib.asynccontextmanager
    async def request(self, owner: str) -> AsyncIterator[Any]:
        """Use a connection for a request of an owner. The owners get connections in turn."""
        async with self._places.of(owner), self.connection() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def connection(self, *, urgent: bool = False) -> AsyncIterator[Any]:
        """Use a connection.

        Args:
            urgent: do not wait for the requests, which may hold all other connections.

        Raises:
            StoreError: the database cannot be used now, or a statement failed.
        """
        pool = self._pool
        if pool is None:
            raise StoreError("the store is closed")
        if not self._guard.held:
            raise StoreError("the lock of the database was lost")
        free = self._guard.connection() if urgent else pool.acquire(timeout=self._timeout)
        try:
            async with free as connection:
                yield connection
        except (*FAILURES, ValueError) as error:
            raise StoreError(reason_of(error)) from error


async def _keep(_: Any) -> None:
    """Return a connection to the pool as it is: no call changes its settings."""


def _is_whole(entry: Entry) -> bool:
    """Whether an entry can be saved without the pieces that the store has."""
    terminal = entry.terminal
    return terminal is None or (not entry.after and terminal.seq == len(entry.pieces))


async def _joined(connection: Any, entry: Entry) -> Entry:
    """Return an entry with all pieces of its reply: those in the store, and its own."""
    header = entry.header
    row = await connection.fetchrow(
        f"{PIECES} FOR UPDATE OF generation", header.owner, header.id, header.began
    )
    pieces = Pieces() if row is None else pieces_of(row)
    pieces.replace(entry.after, entry.pieces)
    return replace(entry, after=0, pieces=pieces)


def _rows(status: str) -> int:
    """Return the number of rows in the status of a statement, such as ``DELETE 3``."""
    return int(status.rpartition(" ")[2])


def _end(before: int | None) -> int:
    """Return the number before which rows are read. A client may send any number."""
    return MAX_NUMBER if before is None else max(0, min(before, MAX_NUMBER))
