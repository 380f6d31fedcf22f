"""Threads and transactions of the SQLite store."""

# ruff: noqa: ASYNC240 - the files are small, and nothing else is in the way of waiting for them

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stores.support import (
    SECONDS,
    Clock,
    Hold,
    done,
    entry,
    found,
    header,
    load,
    loaded,
    refused,
    tokens_spent,
    trace,
    whole,
    workers,
)
from tests.support.pieces import heard
from wsserver.stores.base import (
    StoredGeneration,
)
from wsserver.stores.database import Connection
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


def cancel() -> None:
    """Cancel the running task at its next await."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def test_cancelled_commit_is_saved_whole_or_not_at_all(
    file: SqliteStore, clock: Clock
) -> None:
    statements = await trace(file.writer)
    await file.commit([whole(header("whole", "whole")), whole(header("outside", None))])
    assert statements[0].startswith("BEGIN")
    assert statements[-1] == "COMMIT"
    for number in range(1, len(statements) + 1):
        batch = [whole(header(f"g{number}", f"c{number}")), whole(header(f"o{number}", None))]
        async with Hold(file.writer, number) as hold:
            commit = asyncio.ensure_future(file.commit(batch))
            waits = asyncio.ensure_future(file.commit([whole(header(f"w{number}", "waits"))]))
            await hold.reached()
            commit.cancel()
            waits.cancel()
            await asyncio.wait({commit, waits})
        assert commit.cancelled()
        assert waits.cancelled()
        await file.commit([whole(header(f"after{number}", "whole"))])
        assert await found(file, f"after{number}") == ["Hi."]
        # The commit had begun, and continued in its thread.
        assert [await found(file, name + str(number)) for name in "go"] == [["Hi."]] * 2
        assert await found(file, f"w{number}") is None
        assert await tokens_spent(file, "me", 0) == 8 * (2 + 3 * number)


async def test_cancelled_read_releases_its_snapshot(file: SqliteStore) -> None:
    await file.commit([whole(header())])
    statements = await trace(file.reader)
    await loaded(file)
    for number in range(1, len(statements) + 1):
        async with Hold(file.reader, number) as hold:
            reading = asyncio.ensure_future(load(file, "c", "me", 10))
            await hold.reached()
            reading.cancel()
            await asyncio.wait({reading})
        assert reading.cancelled()
        await file.commit([whole(header(f"g{number}"))])
        assert await found(file, f"g{number}") == ["Hi."]


async def test_cancelled_open_leaves_nothing_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = at = 0

    def watched(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def trip(*arguments: Any) -> Any:
            nonlocal trips
            trips += 1
            if trips == at:
                cancel()
            return await method(*arguments)

        return trip

    for method in (Connection.open, Connection.call):
        monkeypatch.setattr(Connection, method.__name__, watched(method))
    store = SqliteStore(path)
    await store.open()
    needed = trips
    await store.close()
    for number in range(1, needed + 1):
        trips, at = 0, number
        opening = asyncio.ensure_future(store.open())
        async with asyncio.timeout(SECONDS):
            with pytest.raises(asyncio.CancelledError):
                await opening
            at = 0
            await store.open()
            await store.close()


async def test_commits_run_one_after_another(file: SqliteStore) -> None:
    statements = await trace(file.writer)
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(
            *(file.commit([whole(header(f"g{number}"))]) for number in range(5)),
            file.rename("me", "unknown", "x"),
            file.delete("me", "unknown"),
            file.purge(0.0),
        )
    first_words = [statement.split()[0] for statement in statements]
    edges = [word for word in first_words if word in {"BEGIN", "COMMIT", "ROLLBACK"}]
    assert edges == ["BEGIN", "COMMIT"] * 8
    assert len((await loaded(file)).turns) == 5


async def test_concurrent_reads_return_whole_results(
    file: SqliteStore,
) -> None:
    await file.commit([whole(header())])
    async with asyncio.timeout(SECONDS):
        for _ in range(5):
            conversation, stored, summaries = await asyncio.gather(
                load(file, "c", "me", 10), file.find("me", "g"), file.list("me", 10, None)
            )
            assert conversation is not None
            assert isinstance(stored, StoredGeneration)
            assert len(conversation.turns) == len(stored.pieces) == len(summaries) == 1


async def test_read_sees_one_snapshot(file: SqliteStore) -> None:
    await file.commit([entry(header(), True, 0, ["a"])])
    async with Hold(file.reader, 3) as hold:
        finding = asyncio.ensure_future(file.find("me", "g"))
        await hold.reached()
        await file.commit([entry(header(), False, 1, ["b"], done())])
    stored = await finding
    assert isinstance(stored, StoredGeneration)
    assert (heard(stored.pieces), stored.terminal) == (["a"], None)
    assert await found(file) == ["a", "b"]

    async with Hold(file.reader, 3) as hold:
        loading = asyncio.ensure_future(loaded(file))
        await hold.reached()
        await file.delete("me", "c")
    assert [turn.text for turn in (await loading).turns] == ["ab"]
    assert await load(file, "c", "me", 10) is None


async def test_close_waits_for_running_commit(file: SqliteStore) -> None:
    async with Hold(file.writer, 1) as hold:
        commit = asyncio.ensure_future(file.commit([whole(header())]))
        await hold.reached()
        closing = asyncio.gather(file.close(), file.close())
        await asyncio.wait({closing}, timeout=0)
        assert not closing.done()
    async with asyncio.timeout(SECONDS):
        await closing
        assert commit.done()
        await commit
    await file.open()
    assert await found(file) == ["Hi."]


async def test_cancelled_close_can_be_repeated(file: SqliteStore) -> None:
    async with Hold(file.writer, 1) as hold:
        commit = asyncio.ensure_future(file.commit([whole(header())]))
        await hold.reached()
        close = asyncio.ensure_future(file.close())
        await asyncio.wait({close}, timeout=0)
        close.cancel()
        await asyncio.wait({close})
    async with asyncio.timeout(SECONDS):
        await commit
        assert await found(file) == ["Hi."]
        await file.close()


async def test_close_leaves_no_thread_and_no_open_connection(path: Path) -> None:
    before = workers()
    store = SqliteStore(path)
    await store.open()
    assert len(workers() - before) == 2
    await store.commit([whole(header())])
    await loaded(store)
    await refused(SqliteStore(path))
    await store.close()
    for thread in workers() - before:
        thread.join(SECONDS)
    assert workers() == before
    del store
    gc.collect()  # warnings of the collector are errors


async def test_unopened_store_can_be_closed(path: Path) -> None:
    await SqliteStore(path).close()
    assert not path.exists()
