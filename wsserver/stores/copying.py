"""Copies everything from a SQLite file to PostgreSQL. A copy that was broken off can go on."""

import asyncio
import json
import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsserver.errors import ConfigError, StoreError
from wsserver.stores.postgres.store import ADDRESS, PostgresStore
from wsserver.stores.reads import read_batches
from wsserver.stores.records import Packed, dump_batch
from wsserver.stores.sqlite import SqliteStore

ROWS = 500  # per step
TIMEOUT = 60.0  # seconds for a step
REPLIES = 50  # per step, because one may have megabytes

Key = Sequence[Any]
Report = Callable[[int, int], None]
"""Called after each step with the number of rows that were copied, and of all rows."""


@dataclass(frozen=True, slots=True)
class _Table:
    """How the rows of a table are read in order, and written.

    Attributes:
        name: the table.
        key: the columns by which the rows are ordered.
        first: a key below all keys.
        columns: the columns that are copied.
    """

    name: str
    key: tuple[str, ...]
    first: Key
    columns: tuple[str, ...]

    @property
    def select(self) -> str:
        """The statement that reads the rows after a key."""
        key = ", ".join(self.key)
        marks = ", ".join("?" * len(self.key))
        return (
            f"SELECT {', '.join(self.columns)} FROM {self.name} "  # noqa: S608 - constants
            f"WHERE ({key}) > ({marks}) ORDER BY {key} LIMIT ?"
        )


_NAMES = ("owner", "id")
_TABLES = (
    _Table("conversation", _NAMES, ("", ""), (*_NAMES, "title", "created", "updated", "place")),
    _Table("forgotten", _NAMES, ("", ""), (*_NAMES, "at")),
    _Table("counted", (*_NAMES, "began"), ("", "", 0), (*_NAMES, "began", "day")),
    _Table("spent", ("owner", "day"), ("", 0), ("owner", "day", "tokens", "microdollars")),
)
_HEAD = (
    *_NAMES, "began", "ended", "conversation", "turn", "hidden", "retry_of", "size", "rest",
    "model", "prompt", "terminal",
)  # fmt: skip
_GENERATION = _Table(
    "generation", ("number",), (0,), (*_HEAD, "text", "thinking", "lengths", "runs", "number")
)
_TARGET = (*_HEAD, "text", "other", "lengths", "runs")


async def copy(source: SqliteStore, target: PostgresStore, report: Report) -> list[str]:
    """Copy all conversations, replies, traces and costs.

    Args:
        source: the open store that is read. Nothing changes in it.
        target: the open store that is written. It is empty, or has a part of an earlier copy.
        report: tells of each step.

    Returns:
        A line for each reply that PostgreSQL cannot store, or that is damaged. The others are
        copied.

    Raises:
        ConfigError: the target has other conversations.
        StoreError: a store failed. The next copy goes on after the last step.
    """
    total = await source.reader.call(_count)
    async with target.connection() as connection:
        progress = await _progress(connection)
        copied: int = progress.pop("copied", 0)
        problems: list[str] = progress.pop("problems", [])
        for table in (*_TABLES, _GENERATION):
            key: Key = progress.get(table.name, table.first)
            limit = REPLIES if table is _GENERATION else ROWS
            while rows := await source.reader.call(lambda file: _read(file, table, key, limit)):  # noqa: B023
                key = rows[-1].key
                good = [row for row in rows if not row.problem]
                new = (row.problem for row in rows if row.problem)
                problems = list(dict.fromkeys((*problems, *new)))
                copied += len(rows)
                progress[table.name] = key
                async with connection.transaction():
                    await _write(connection, table, good)
                    saved = {**progress, "copied": copied, "problems": problems}
                    await connection.execute("UPDATE copying SET progress = $1", json.dumps(saved))
                report(copied, total)
        async with connection.transaction():
            await connection.execute(
                "SELECT setval('use', (SELECT coalesce(max(place), 0) + 1 FROM conversation))"
            )
            await connection.execute("DROP TABLE copying")
    return problems


@dataclass(frozen=True, slots=True)
class _Row:
    key: Key
    values: tuple[Any, ...]
    batch: str | None = None  # the pieces of a reply without an end
    problem: str = ""


def _count(file: sqlite3.Connection) -> int:
    names = [table.name for table in (*_TABLES, _GENERATION)]
    counts = (file.execute(f"SELECT count(*) FROM {name}").fetchone() for name in names)  # noqa: S608
    return sum(count for (count,) in counts)


def _read(file: sqlite3.Connection, table: _Table, after: Key, limit: int) -> list[_Row]:
    found = file.execute(table.select, (*after, limit)).fetchall()
    if table is _GENERATION:
        return [_reply(file, row) for row in found]
    places = [table.columns.index(name) for name in table.key]
    rows = []
    for row in found:
        values = row
        if table.name == "conversation":
            values = (*row[:2], row[2].encode(), *row[3:])
        problem = _problem_with(row[:2])
        rows.append(_Row([row[place] for place in places], values, problem=problem))
    return rows


def _reply(file: sqlite3.Connection, row: tuple[Any, ...]) -> _Row:
    """Convert a row of `generation`: the pieces of older versions are packed another way."""
    *head, text, other, lengths, runs, number = row
    owner, name = head[0], head[1]
    batch = None
    if problem := _problem_with((owner, name, head[10])):
        return _Row([number], (), problem=problem)
    try:
        if lengths is None:
            pieces = read_batches(file, number)
            batch = dump_batch(pieces) if len(pieces) else None
        else:
            packed = Packed(text, other, lengths, runs)
            if runs is None:
                packed = Packed.of(packed.pieces())
            text, other = packed.text.encode(), packed.other.encode()
            lengths, runs = packed.lengths, packed.runs
        if lengths is None or head[-1] is None:  # without an end, the pieces are not packed
            if lengths is not None:
                batch = dump_batch(Packed(text.decode(), other.decode(), lengths, runs).pieces())
            text = other = lengths = runs = None
    except (ValueError, TypeError) as error:
        problem = f"the reply {name!r} of {owner!r}: {type(error).__name__}"
        return _Row([number], (), problem=problem)
    return _Row([number], (*head, text, other, lengths, runs), batch)


def _problem_with(names: Sequence[Any]) -> str:
    """Return why PostgreSQL cannot store these names; an empty text if it can."""
    bad = next((name for name in names if isinstance(name, str) and "\0" in name), None)
    return "" if bad is None else f"everything of the name {bad!r}, because it has U+0000"


async def _progress(connection: Any) -> dict[str, Any]:
    """Return the progress of an earlier copy, or begin a copy.

    Raises:
        ConfigError: the tables have other conversations.
    """
    if await connection.fetchval("SELECT to_regclass('copying') IS NOT NULL"):
        progress: dict[str, Any] = json.loads(
            await connection.fetchval("SELECT progress FROM copying")
        )
        return progress
    for table in (*_TABLES, _GENERATION):
        if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table.name})"):  # noqa: S608
            raise ConfigError(
                "store: the target has conversations already; copy into an empty database, or into "
                "another ?search_path="
            )
    await connection.execute("CREATE TABLE copying (progress text NOT NULL)")
    await connection.execute("INSERT INTO copying VALUES ('{}')")
    return {}


async def _write(connection: Any, table: _Table, rows: Sequence[_Row]) -> None:
    if not rows:
        return
    columns = _TARGET if table is _GENERATION else table.columns
    await connection.copy_records_to_table(
        table.name, records=[row.values for row in rows], columns=columns
    )
    batches = [row for row in rows if row.batch is not None]
    if batches:
        owners, names, began = zip(*(row.values[:3] for row in batches), strict=True)
        await connection.execute(
            "INSERT INTO piece SELECT number, 0, batch FROM generation JOIN "
            "unnest($1::text[], $2::text[], $3::float8[], $4::text[]) "
            "AS own(owner, id, began, batch) USING (owner, id, began)",
            owners,
            names,
            began,
            [row.batch for row in batches],
        )


BAR = 30  # characters of the progress bar


def run(source: str, target: str) -> int:
    """Copy a store as the command line says; return the exit code.

    Args:
        source: ``sqlite:///PATH``.
        target: ``postgresql://…``.

    Raises:
        ConfigError: a store cannot be used, or the target has other conversations.
    """
    path = Path(source.removeprefix("sqlite:///")).expanduser()
    if not source.startswith("sqlite:///") or not target.startswith(ADDRESS):
        raise ConfigError("store: copy from sqlite:///PATH to postgresql://…")
    if not path.is_file():
        raise ConfigError(f"store: there is no file {path}")
    try:
        problems = asyncio.run(_copy(path, target))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except StoreError as error:
        raise ConfigError(f"store: {error}; the same command goes on from here") from None
    for problem in problems:
        print(f"not copied: {problem}", file=sys.stderr)
    return 1 if problems else 0


async def _copy(path: Path, target: str) -> list[str]:
    read, written = SqliteStore(path), PostgresStore(target, TIMEOUT, copying=True)
    await read.open()
    try:
        await written.open()
        return await copy(read, written, _show)
    finally:
        await written.close()
        await read.close()


def _show(copied: int, total: int) -> None:
    """Draw the progress on a terminal; in a log, tell the end only."""
    if sys.stderr.isatty():
        done = BAR * copied // total
        end = "\n" if copied == total else ""
        bar = "#" * done + "-" * (BAR - done)
        print(f"\r[{bar}] {copied:,} of {total:,} rows", end=end, file=sys.stderr, flush=True)
    elif copied == total:
        print(f"copied {total:,} rows", file=sys.stderr)
