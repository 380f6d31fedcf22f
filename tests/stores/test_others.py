"""Other programs that use the SQLite file."""

# ruff: noqa: ASYNC240 - the files are small, and nothing else is in the way of waiting for them

import asyncio
import sqlite3
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.stores.support import (
    DAY,
    SECONDS,
    Clock,
    call_back,
    check,
    entry,
    found,
    header,
    loaded,
    names,
    query,
    refused,
    tokens_spent,
    whole,
)
from tests.support.pieces import Thinking, heard
from wsserver.errors import ConfigError, StoreError
from wsserver.prices import Prices, Spent
from wsserver.stores import sqlite
from wsserver.stores.base import (
    StoredGeneration,
)
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


async def test_second_store_of_same_file_is_refused(file: SqliteStore, path: Path) -> None:
    other = SqliteStore(path)
    message = await refused(other)
    assert "another server" in message
    assert str(path) in message
    await file.commit([whole(header())])  # the first store still works
    await file.close()
    await other.open()
    assert await found(other) == ["Hi."]
    assert "another server" in await refused(file)
    await other.close()


async def test_open_store_cannot_be_opened_again(file: SqliteStore) -> None:
    with pytest.raises(ConfigError, match="another server"):
        await file.open()
    await file.commit([whole(header())])
    assert await found(file) == ["Hi."]


async def test_file_is_locked_under_any_path(file: SqliteStore, path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    assert "another server" in await refused(SqliteStore(link))
    folder = path.parent / "folder"
    folder.symlink_to(path.parent)
    assert "another server" in await refused(SqliteStore(folder / "chat.db"))
    assert "another server" in await refused(SqliteStore(path.parent / "x" / ".." / "chat.db"))


async def test_relative_path_is_resolved_when_store_is_made(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    store = SqliteStore(Path("chat.db"))
    monkeypatch.chdir("/")
    await store.open()
    await store.close()
    assert path.is_file()


async def test_killed_process_frees_lock_and_keeps_commits(
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
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert heard(stored.pieces) == ["a", "b"]
    assert stored.terminal is None
    await store.close()
    check(path)


async def test_generation_of_dead_process_is_purged_in_time(
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


async def test_generation_of_dead_process_costs_price_of_model(path: Path, clock: Clock) -> None:
    file = SqliteStore(path, prices=Prices(["dear=1/100"]))
    await file.open()
    dear = replace(header("dear", None), model="dear")
    await file.commit([entry(dear, True, 0, ["five hundred letters " * 4])])
    await file.close()
    await file.open()
    assert await file.spent("me", 0) == Spent(21, 2100)
    await file.close()


async def test_generation_of_dead_process_is_charged_for_its_text(
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
async def test_damaged_generation_of_dead_process_does_not_stop_start(
    file: SqliteStore, path: Path, clock: Clock, texts: str
) -> None:
    await file.commit([entry(header("g"), True, 0, ["a"]), entry(header("h"), True, 0, ["b"])])
    await file.close()
    query(path, f"UPDATE piece SET texts = {texts} WHERE generation = 1")
    await file.open()
    assert await tokens_spent(file, "me", 0) == 1
    assert await found(file, "h") == ["b"]


async def test_generations_of_dead_process_are_found_by_index(
    file: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database: sqlite3.Connection = connect(*arguments, **options)
        database.set_trace_callback(statements.append)
        return database

    await file.close()
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        await file.open()
    (dead,) = (statement for statement in statements if "FROM generation" in statement)
    plan = query(path, f"EXPLAIN QUERY PLAN {dead}")
    assert [step[-1] for step in plan] == [
        "SEARCH generation USING INDEX generation_loose (ended=?)"
    ]


async def test_accounts_are_kept_for_90_days_and_purged_in_steps(
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


async def test_writes_fail_while_other_program_locks_file(file: SqliteStore, path: Path) -> None:
    await file.commit([whole(header())])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    async with asyncio.timeout(SECONDS):
        for attempt in (
            lambda: file.commit([whole(header("h"))]),
            lambda: file.rename("me", "c", "New"),
            lambda: file.delete("me", "c"),
            lambda: file.purge(1e12),
        ):
            with pytest.raises(StoreError, match="locked"):
                await attempt()
        assert await found(file) == ["Hi."]  # reads still work
        assert (await loaded(file)).title == "Hello?"
        assert await names(file) == ["c"]
    other.execute("ROLLBACK")
    other.close()
    await file.commit([whole(header("h"))])
    assert await found(file, "h") == ["Hi."]


async def test_write_waits_for_lock_of_other_program(path: Path) -> None:
    store = SqliteStore(path, timeout=SECONDS)
    await store.open()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    begun = threading.Event()
    await call_back(store.writer, lambda statement: begun.set())
    commit = asyncio.ensure_future(store.commit([whole(header())]))
    async with asyncio.timeout(SECONDS):
        await asyncio.to_thread(begun.wait, SECONDS)
        assert not commit.done()
        other.execute("ROLLBACK")
        await commit
    other.close()
    assert await found(store) == ["Hi."]
    await store.close()


async def test_file_locked_by_other_program_is_refused_until_free(
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
