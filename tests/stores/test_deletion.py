"""Deleted text is gone from the SQLite files."""

# ruff: noqa: ASYNC240 - the files are small, and nothing else is in the way of waiting for them

import asyncio
import contextlib
import itertools
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.stores.support import (
    SECONDS,
    done,
    entry,
    header,
    load,
    loaded,
    names,
    query,
    trace,
    whole,
)
from tests.support.pieces import Thinking
from wsserver.errors import StoreError
from wsserver.stores import fair, sqlite
from wsserver.stores.base import (
    Forgotten,
)
from wsserver.stores.database import Connection
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


def traces_in(path: Path, word: bytes) -> list[str]:
    """Return the files of a database that contain a word."""
    return [file.name for file in path.parent.glob("chat.db*") if word in file.read_bytes()]


@pytest.mark.parametrize("size", [1, 300, 3000, 100_000])
async def test_deleted_text_is_in_no_file(file: SqliteStore, path: Path, size: int) -> None:
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
    await file.rename("me", "secret", "Geheimnis")
    await file.commit([whole(header("o", None, prompt="Geheimnis?"), "Geheimnis.")])
    assert traces_in(path, b"Geheimnis")
    assert await file.delete("me", "secret")
    await file.purge(1e12)
    assert traces_in(path, b"Geheimnis") == []
    assert traces_in(path, b"Bekanntes")
    assert len((await loaded(file, "kept")).turns) == 20


async def test_deleted_text_leaves_wal_after_last_reader(file: SqliteStore, path: Path) -> None:
    await file.commit([whole(header(), "Geheimnis")])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM generation").fetchall()
    assert await file.delete("me", "c")
    assert traces_in(path, b"Geheimnis")  # the other program may still read it
    other.execute("COMMIT")
    other.close()
    await file.purge(0.0)
    assert traces_in(path, b"Geheimnis") == []


async def test_delete_does_not_wait_for_reader_in_other_program(path: Path) -> None:
    store = SqliteStore(path, timeout=3600.0)
    await store.open()
    await store.commit([whole(header(), "Geheimnis")])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM generation").fetchall()
        try:
            async with asyncio.timeout(SECONDS):
                assert await store.delete("me", "c")
                await store.purge(0.0)
                await store.commit([whole(header("g2"), "x")])
        finally:
            other.execute("COMMIT")
    await store.close()


async def test_large_delete_lets_other_writes_run_between_steps(
    file: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "DELETED_AT_ONCE", 50_000)
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 7)
    await file.commit([whole(header(f"g{n}"), "x" * 1000) for n in range(20)])
    await file.commit([whole(header(f"h{n}"), "x" * 30_000) for n in range(6)])
    statements = await trace(file.writer)
    deleting = asyncio.ensure_future(file.delete("me", "c"))
    writing = [asyncio.ensure_future(file.commit([whole(header(f"o{n}", "o"))])) for n in range(3)]
    assert await deleting
    await asyncio.gather(*writing)
    kinds = {"DELETE FROM generation": "step", "INSERT INTO counted": "commit"}
    found = [kind for said in statements for word, kind in kinds.items() if said.startswith(word)]
    order = [kind for kind, _ in itertools.groupby(found)]
    assert order[:3] == ["step", "commit", "step"]
    assert await names(file) == ["o"]


async def test_concurrent_deletes_share_wal_truncation(
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
    statements = await trace(file.writer)
    deletes = [file.delete(owner, f"c{n}") for n in range(30) for owner in owners]
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


async def test_delete_interrupted_by_crash_is_finished_at_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 2)
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header(f"g{n}")) for n in range(5)])
    await store.commit([whole(header("h", "d"))])
    steps = 0
    transact = Connection.transact

    async def dies(self: Connection, *work: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise StoreError("the process dies here")
        return await transact(self, *work)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "transact", dies)
        with pytest.raises(StoreError):
            await store.delete("me", "c")
    assert len(query(path, "SELECT * FROM generation WHERE conversation = 'c'")) == 3
    assert await names(store) == ["d"]
    assert await load(store, "c", "me", 10) is None
    await store.close()
    await store.open()
    assert await names(store) == ["d"]
    assert len(query(path, "SELECT * FROM generation")) == 1
    assert isinstance(await store.find("me", "g4"), Forgotten)
    await store.close()


async def test_turn_accepted_after_interrupted_delete_is_kept(
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
async def test_held_bytes_match_file_size(file: SqliteStore, path: Path, size: int) -> None:
    count = max(40, 400_000 // size // 10)
    for number in range(count):
        pieces = [f"{word} " for word in ("x" * size).replace("xxxxx", "xxxx ").split()]
        name = f"generation-{number:012}"
        await file.commit([whole(header(name, f"conversation-{number % 20:010}"), *pieces)])
    held = (await file.amounts("me")).bytes
    await file.close()  # close empties the WAL
    taken = path.stat().st_size
    assert 0.6 < held / (taken - 90_000) < 1.6, (held, taken)
