"""The SQLite file: how it is made, opened and migrated."""

# ruff: noqa: ASYNC240 - the files are small, and nothing else is in the way of waiting for them

import os
import re
import sqlite3
from pathlib import Path

import pytest

from tests.stores.support import (
    Clock,
    ask,
    check,
    done,
    found,
    header,
    kinds,
    listed,
    loaded,
    query,
    refused,
    tokens_spent,
    trace,
    whole,
)
from tests.support.pieces import Thinking, heard
from wsserver.stores import sqlite
from wsserver.stores.base import (
    StoredGeneration,
)
from wsserver.stores.migrations import MIGRATIONS
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


async def test_file_uses_wal_and_foreign_keys(file: SqliteStore, path: Path) -> None:
    assert query(path, "PRAGMA journal_mode") == [("wal",)]
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    for connection in (file.writer, file.reader):
        assert await ask(connection, "PRAGMA foreign_keys") == [(1,)]
        assert await ask(connection, "PRAGMA synchronous") == [(1,)]
        assert await ask(connection, "PRAGMA busy_timeout") == [(10,)]


async def test_close_leaves_database_and_lock_file_only(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    await store.close()
    assert {found.name for found in path.parent.iterdir()} == {"chat.db", "chat.db.lock"}


async def test_backup_of_open_file_has_all_conversations(
    file: SqliteStore, path: Path, tmp_path: Path
) -> None:
    await file.commit([whole(header())])
    with sqlite3.connect(path) as source, sqlite3.connect(tmp_path / "copy.db") as target:
        source.backup(target)
    source.close()
    target.close()
    copy = SqliteStore(tmp_path / "copy.db")
    await copy.open()
    assert await listed(copy) == await listed(file) != []
    await copy.close()


async def test_missing_folders_are_created(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "chat.db"
    store = SqliteStore(path)
    await store.open()
    await store.close()
    check(path)


async def test_empty_file_is_migrated(path: Path) -> None:
    path.touch()
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    assert await found(store) == ["Hi."]
    await store.close()


async def test_file_of_older_version_is_migrated_with_data(
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


async def test_file_of_version_1_is_migrated(path: Path, clock: Clock) -> None:
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
    assert await tokens_spent(store, "me", 0) == 2  # of the interrupted generation
    await store.commit([whole(header("i"))])
    assert await tokens_spent(store, "me", 0) == 10
    await store.close()
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    check(path)


async def test_file_of_version_2_is_migrated(path: Path, clock: Clock) -> None:
    prompt, end = '{"prompt": "Hello?"}', done().model_dump_json(exclude_none=True)
    database = sqlite3.connect(path)
    database.executescript("".join(MIGRATIONS[:2]))
    database.executemany(
        "INSERT INTO conversation (id, owner, title, created, updated) VALUES (?, ?, ?, ?, ?)",
        [("c", "me", "First", 1.0, 9.0), ("d", "you", "Second", 2.0, 4.0)],
    )
    rows = [  # the last one has another owner than its conversation
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
    assert await ask(store.writer, "PRAGMA foreign_keys") == [(1,)]
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
    outside = await store.find("me", "o")
    assert isinstance(outside, StoredGeneration)
    assert outside.header.conversation is None
    assert (outside.terminal, kinds(heard(outside.pieces))) == (
        done().model_copy(update={"id": "o"}),
        kinds(["3", Thinking("t"), "3", Thinking("t")]),
    )
    assert await found(store, "g1", "you") == ["2", "t", "2", "t"]
    assert await tokens_spent(store, "me", 0) == 8 + 2  # and the text of the interrupted generation

    await store.commit([whole(header("g3"), "new")])
    assert [turn.number for turn in (await loaded(store)).turns] == [1, 2, 3]
    assert await store.delete("me", "c")
    assert query(path, "SELECT DISTINCT generation FROM piece") == [(20,), (30,), (50,)]
    assert len((await loaded(store, "c", "you")).turns) == 1
    await store.close()
    assert query(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    check(path)

    # The tables equal those of a new file.
    new = path.with_name("new.db")
    store = SqliteStore(new)
    await store.open()
    await store.close()
    tables = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    assert query(path, tables) == query(new, tables)


async def test_statements_scan_no_whole_table(file: SqliteStore, path: Path) -> None:
    statements = await trace(file.writer)
    await trace(file.reader, statements)
    await file.commit([whole(header()), whole(header("o", None))])
    await loaded(file)
    await found(file)
    await file.list("me", 10, 9)
    await file.rename("me", "c", "New")
    await file.delete("me", "c")
    await file.purge(1e12)
    await file.spent("me", 0)
    asked = [statement for statement in statements if re.match("SELECT|INSERT|UPD|DEL", statement)]
    assert len(asked) > 15
    for statement in asked:
        for step in query(path, f"EXPLAIN QUERY PLAN {statement}"):
            assert not re.match("SCAN (TABLE )?[a-z]", step[-1]), (statement, step)


async def test_failed_migration_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(path)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "MIGRATIONS", [*MIGRATIONS, "CREATE TABLE generation (x);"])
        assert "already exists" in await refused(store)
    assert query(path, "SELECT * FROM sqlite_master") == []
    await store.open()
    await store.close()


async def test_file_of_later_version_is_refused_unchanged(path: Path) -> None:
    query(path, "PRAGMA user_version = 99")
    before = path.read_bytes()
    message = await refused(SqliteStore(path))
    assert str(path) in message
    assert "later version" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("statement", ["CREATE TABLE theirs (x)", "PRAGMA user_version = -1"])
async def test_database_of_other_program_is_refused_unchanged(path: Path, statement: str) -> None:
    query(path, statement)
    before = path.read_bytes()
    message = await refused(SqliteStore(path))
    assert str(path) in message
    assert "another program" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"Dear diary,\n" * 100, b"Dear diary,\n" * 1000, b"SQLite format 3\0" + b"x" * 84]
)
async def test_file_of_other_format_is_refused_unchanged(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert str(path) in await refused(SqliteStore(path))
    assert path.read_bytes() == content
    path.unlink()
    store = SqliteStore(path)  # the failure left no lock
    await store.open()
    await store.close()


async def test_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert f"{folder} is a folder" in await refused(SqliteStore(folder))
    assert "is a folder" in await refused(SqliteStore(Path("/")))
    assert "is a folder" in await refused(SqliteStore(Path()))
    assert list(tmp_path.iterdir()) == [folder]


async def test_path_below_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "chat.db", tmp_path / "file" / "deeper" / "chat.db"):
        assert str(path) in await refused(SqliteStore(path))


async def test_link_to_itself_is_refused_before_database_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", None)
    path.symlink_to(path)
    assert str(path) in await refused(SqliteStore(path))


async def test_error_names_unusable_lock_file(path: Path) -> None:
    path.with_name("chat.db.lock").mkdir()
    assert "chat.db.lock" in await refused(SqliteStore(path))


@pytest.mark.parametrize("exists", [True, False])
async def test_read_only_file_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    # SQLite opens the file read-only, because permissions do not restrict root.
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
async def test_error_names_file_with_missing_permission(path: Path, what: str) -> None:
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
