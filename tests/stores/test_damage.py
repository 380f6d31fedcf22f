"""Damaged, full and missing SQLite files."""

# ruff: noqa: ASYNC240 - the files are small, and nothing else is in the way of waiting for them

import asyncio
import random
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.stores.support import (
    SECONDS,
    ask,
    entry,
    found,
    header,
    load,
    names,
    query,
    refused,
    whole,
)
from tests.support.puppet import until
from wsserver.errors import ConfigError, StoreError
from wsserver.stores import sqlite
from wsserver.stores.base import (
    Unsavable,
)
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


async def test_full_disk_fails_whole_batch_and_no_later_one(file: SqliteStore, path: Path) -> None:
    await file.commit([entry(header(), True, 0, ["Hi."]), whole(header("o", None))])
    ((pages,),) = await ask(file.writer, "PRAGMA page_count")
    await ask(file.writer, f"PRAGMA max_page_count = {pages + 2}")
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
        assert query(path, "SELECT tokens FROM spent") == [(8,)]
    await file.commit([entry(header(), False, 1, ["little"])])  # this still fits
    assert await found(file) == ["Hi.", "little"]
    await ask(file.writer, "PRAGMA max_page_count = 1000000")
    await file.commit(batch[1:])
    assert len(await names(file)) == 21
    assert await found(file, "h19") == ["x" * 5000]


async def test_unsavable_entry_fails_whole_batch(file: SqliteStore) -> None:
    bad = whole(header("h"), "half a pair: \ud800")
    with pytest.raises(Unsavable) as raised:
        await file.commit([whole(header()), bad, whole(header("i"))])
    assert raised.value.entry is bad
    assert "half" not in str(raised.value)
    assert await names(file) == []
    await file.commit([whole(header())])
    assert await names(file) == ["c"]


async def test_lone_surrogate_in_query_is_store_error(file: SqliteStore) -> None:
    for attempt in (
        lambda: file.find("me", "\ud800"),
        lambda: load(file, "\ud800", "me", 1),
        lambda: file.list("\ud800", 1, None),
        lambda: file.rename("me", "\ud800", "x"),
        lambda: file.delete("me", "\ud800"),
        lambda: file.spent("\ud800", 0),
    ):
        with pytest.raises(StoreError):
            await attempt()
    assert await names(file) == []


async def all_that_can_be_asked(store: SqliteStore) -> int:
    """Call every method of a store in a broken file; return the number of failures."""
    failures = 0
    for attempt in (
        lambda: store.find("me", "g3"),
        lambda: store.find("me", "g9"),
        lambda: load(store, "c3", "me", 100),
        lambda: load(store, "c3", "me", 2, 50),
        lambda: store.list("me", 100, None),
        lambda: store.rename("me", "c3", "New"),
        lambda: store.commit([whole(header(f"n{number}", f"c{number}")) for number in range(9)]),
        lambda: store.delete("me", "c5"),
        lambda: store.purge(1e12),
        lambda: store.spent("me", 0),
    ):
        try:
            await attempt()
        except StoreError:
            failures += 1
    return failures


async def test_broken_file_raises_only_store_errors(path: Path) -> None:
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
    for _ in range(40):  # and single bytes, which change the type of a value
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


async def test_file_with_invalid_schema_text_is_refused(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.close()
    path.write_bytes(path.read_bytes().replace(b"WITHOUT ROWID", b"WITHOUT R\xffWID"))
    assert str(path) in await refused(store)


@pytest.mark.parametrize("size", [0, 50, 4096, 3 * 4096 + 17])
async def test_truncated_file_raises_only_store_errors(path: Path, size: int) -> None:
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
async def test_error_about_damage_has_no_text_of_conversation(
    path: Path, damage: str, fails: str
) -> None:
    store = SqliteStore(path)
    await store.open()
    running = "piece" in damage
    await store.commit([entry(header(), True, 0, ["Hi."]) if running else whole(header())])
    query(path, damage)
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "find": lambda: store.find("me", "g"),
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


async def test_closed_store_fails(file: SqliteStore) -> None:
    await file.close()
    assert await all_that_can_be_asked(file) == 10


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_writes_to_deleted_or_replaced_file_fail(path: Path, suffix: str, how: str) -> None:
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
        lambda: store.rename("me", "c", "New"),
        lambda: store.delete("me", "c"),
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


async def test_damaged_file_is_refused_at_start(path: Path) -> None:
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


async def test_large_file_is_checked_in_background(
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
    # The background check must have ended before the damage.
    await until(lambda: all(t.name != "wsserver-store-check" for t in threading.enumerate()))
    content = bytearray(path.read_bytes())
    for start in range(30 * 4096, len(content) - 4096, 3 * 4096):
        content[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    try:
        await store.open()
        await until(lambda: "store damaged" in caplog.text)
        with pytest.raises(StoreError, match="damaged"):
            await store.probe()
    finally:
        await store.close()


async def test_probe_fails_after_read_finds_damage(file: SqliteStore) -> None:
    await file.probe()

    def meet(database: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT_VTAB
        raise error

    with pytest.raises(StoreError, match="malformed"):
        await file.reader.transact(meet, "BEGIN")
    with pytest.raises(StoreError, match="damaged"):
        await file.probe()
