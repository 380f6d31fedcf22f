"""The stores, for tests of their contract."""

import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stores.support import (
    SECONDS,
    Clock,
    Reopened,
    check,
    workers,
)
from wsserver.stores import MemoryStore, Store
from wsserver.stores.database import Connection
from wsserver.stores.postgres.store import PostgresStore
from wsserver.stores.sqlite import SqliteStore


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
    """Close stores that a failed test left open, and check that close ends all threads."""
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


@pytest.fixture(
    params=[
        "memory",
        "sqlite",
        "sqlite, reopened",
        pytest.param("postgres", marks=pytest.mark.slow),
    ]
)
async def store(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Store]:
    kinds: dict[str, Callable[[], Store]] = {
        "memory": MemoryStore,
        "sqlite": lambda: SqliteStore(path),
        "sqlite, reopened": lambda: Reopened(path),
        "postgres": lambda: PostgresStore(request.getfixturevalue("postgres").url()),
    }
    store = kinds[request.param]()
    await store.open()
    yield store
    await store.close()
    if request.param.startswith("sqlite"):
        check(path)


@pytest.fixture
async def file(path: Path) -> AsyncIterator[SqliteStore]:
    """A store in a file. It does not wait for locks of other programs."""
    store = SqliteStore(path, timeout=0.01)
    await store.open()
    yield store
    await store.close()
    check(path)


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The list to which a connection is added at each call into its thread."""
    trips: list[Connection] = []
    call = Connection.call

    async def watched(self: Connection, work: Callable[[sqlite3.Connection], Any]) -> Any:
        trips.append(self)
        return await call(self, work)

    monkeypatch.setattr(Connection, "call", watched)
    return trips
