"""The cost of calls of the SQLite store."""

import asyncio
from pathlib import Path

import pytest

from tests.stores.support import (
    SECONDS,
    Hold,
    done,
    entry,
    found,
    header,
    load,
    loaded,
    names,
    query,
    read_by,
    whole,
)
from tests.support.pieces import Thinking
from wsserver.errors import Code, Refused
from wsserver.protocol import Prompt
from wsserver.stores import fair, sqlite
from wsserver.stores.base import (
    Header,
)
from wsserver.stores.database import Connection
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


async def test_batch_of_any_size_takes_one_thread_call(
    file: SqliteStore, trips: list[Connection]
) -> None:
    await file.commit([whole(header(f"g{number}", f"c{number}")) for number in range(800)])
    assert len(trips) == 1
    assert len(await names(file)) == 800


async def test_history_of_any_length_takes_one_thread_call(
    file: SqliteStore, trips: list[Connection]
) -> None:
    await file.commit([whole(header(f"g{number}")) for number in range(200)])
    trips.clear()
    assert len((await loaded(file)).turns) == 200
    assert len(trips) == 1
    await found(file, "g7")
    assert len(trips) == 2


async def test_long_prompt_is_read_once_for_all_pieces(file: SqliteStore) -> None:
    asked = header(prompt="x" * 30_000)
    await file.commit([entry(asked, new=True)])
    for number in range(100):
        await file.commit([entry(asked, after=number, pieces=["y"])])
    rows = await read_by(file)
    assert (await loaded(file)).turns[0].text == "y" * 100
    assert await found(file) == ["y"] * 100
    characters = sum(len(value) for row in rows for value in row if isinstance(value, str))
    assert 60_000 < characters < 67_000


async def test_ended_reply_is_read_as_one_row(
    file: SqliteStore,
) -> None:
    await file.commit([entry(header("g1"), True, 0, ["y"] * 100, done())])
    await file.commit([entry(header("g2"), True, 0, ["z"])])
    rows = await read_by(file)
    assert [turn.text for turn in (await loaded(file)).turns] == ["y" * 100, "z"]
    assert len(rows) == 1 + 2 + 1  # the conversation, its turns, and one row of pieces


async def test_load_reads_no_more_bytes_than_size(file: SqliteStore) -> None:
    await file.commit(
        [
            whole(header(f"g{number}", prompt="p" * 5_000), Thinking("t" * 500), "x" * 4_500)
            for number in range(201)
        ]
    )
    rows = await read_by(file)
    stored = await file.load("me", "c", limit=200, size=100_000)
    assert stored is not None
    assert len(stored.turns) == 9
    assert len(rows) == 1 + 9 + 1  # the title, the turns, whether there are older ones
    read = sum(len(value) for row in rows for value in row if isinstance(value, str))
    assert read < 100_000


async def test_hidden_turns_do_not_slow_requests(file: SqliteStore) -> None:
    async def steps_of_a_retry_and_a_history(name: str, retried: str) -> int:
        """Count the steps of SQLite's virtual machine, a hundred at a time."""
        steps: list[None] = []

        def note() -> None:
            steps.append(None)

        for connection in (file.writer, file.reader):
            await connection.call(lambda database: database.set_progress_handler(note, 100))
        again = Header(name, "me", "c", Prompt(prompt="Hello?"), "m", 500.0, retried)
        await file.commit([whole(again)])
        assert [turn.id for turn in (await loaded(file)).turns] == [name]
        stored = await load(file, "c", "me", 10, before=2)
        assert stored is not None
        assert not stored.older
        for connection in (file.writer, file.reader):
            await connection.call(lambda database: database.set_progress_handler(None, 0))
        return len(steps)

    await file.commit([whole(header("g0"))])
    few = await steps_of_a_retry_and_a_history("g1", "g0")
    for number in range(2, 1000):
        retry = Header(
            f"g{number}", "me", "c", Prompt(prompt="Hello?"), "m", 500.0, f"g{number - 1}"
        )
        await file.commit([whole(retry)])
    assert await steps_of_a_retry_and_a_history("g1000", "g999") <= 2 * few + 5


async def test_ended_reply_with_many_pieces_is_one_row(file: SqliteStore, path: Path) -> None:
    asked = header()
    for number in range(200):
        await file.commit([entry(asked, not number, number, [f"piece {number} "])])
    assert query(path, "SELECT count(*) FROM piece") == [(200,)]
    await file.commit([entry(asked, False, 200, [Thinking("hm")], done())])
    assert query(path, "SELECT count(*) FROM piece") == [(0,)]
    assert await found(file) == [*(f"piece {number} " for number in range(200)), "hm"]
    ((row,),) = query(
        path, "SELECT quote(text) || quote(thinking) || quote(lengths) FROM generation"
    )
    assert row.count("piece 17 ") == 1


async def test_pieces_of_older_version_are_packed_in_steps(
    file: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PURGED_AT_ONCE", 2)
    pieces = ["a", Thinking("b"), "c"]
    await file.commit([whole(header(f"g{number}"), *pieces) for number in range(5)])
    query(path, "UPDATE generation SET lengths = NULL, thinking = NULL, runs = NULL")
    query(
        path,
        'INSERT INTO piece SELECT number, 0, \'["a", ["b"]]\' FROM generation '
        "UNION ALL SELECT number, 2, '[\"c\"]' FROM generation",
    )
    query(path, "UPDATE piece SET texts = '[' WHERE generation = 2")
    before = await loaded(file)
    for left in (8, 4, 2, 2):
        await file.purge(0.0)
        assert query(path, "SELECT count(*) FROM piece") == [(left,)]
        assert await found(file, "g0") == pieces
        assert await found(file, "g4") == pieces
    assert await loaded(file) == before


async def test_owners_take_turns(file: SqliteStore) -> None:
    await file.commit([whole(header()), whole(header(owner="you"))])
    order: list[str] = []

    async def ask_as(owner: str) -> None:
        await load(file, "c", owner, 10)
        order.append(owner)

    async with asyncio.timeout(SECONDS), Hold(file.reader, 1) as hold:
        first = asyncio.ensure_future(ask_as("me"))
        await hold.reached()
        tasks = [asyncio.ensure_future(ask_as("me")) for _ in range(50)]
        tasks += [asyncio.ensure_future(ask_as(owner)) for owner in ("you", "they", "you")]
        await asyncio.wait(tasks, timeout=0)
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(first, *tasks)
    assert order[:6] == ["me", "me", "you", "they", "me", "you"]
    assert order[6:] == ["me"] * 48


async def test_waiting_requests_of_one_owner_are_bounded(
    file: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair, "MOST_WAITING", 2)
    async with asyncio.timeout(SECONDS), Hold(file.reader, 1) as hold:
        tasks = [asyncio.ensure_future(file.list("me", 1, None)) for _ in range(3)]
        await hold.reached()
        with pytest.raises(Refused) as raised:
            await file.list("me", 1, None)
        assert raised.value.code is Code.LIMIT
        tasks.append(asyncio.ensure_future(file.list("you", 1, None)))
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        tasks.append(asyncio.ensure_future(file.list("me", 1, None)))
    async with asyncio.timeout(SECONDS):
        await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [False, True, False, False, False]
    assert await file.list("me", 1, None) == []


async def test_cancelled_waiter_passes_lock_on() -> None:
    lock = fair.FairLock()
    await lock.acquire("a")
    second = asyncio.ensure_future(lock.acquire("b"))
    third = asyncio.ensure_future(lock.acquire("c"))
    await asyncio.wait({second, third}, timeout=0)
    lock.release()
    second.cancel()  # before the task has run with its turn
    async with asyncio.timeout(SECONDS):
        await asyncio.wait({second})
        await third
        lock.release()
        await lock.acquire("a")
    lock.release()


async def test_new_file_is_readable_by_its_user_only(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([whole(header())])
    modes = {
        file.stat().st_mode & 0o077
        for file in path.parent.glob(f"{path.name}*")
        if file.stat().st_size
    }
    await store.close()
    assert modes == {0}
