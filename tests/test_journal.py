"""The journal's writer, with stores that fail in every way."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from tests.support.pieces import heard
from tests.support.puppet import BOUND, until
from wsserver.content import Usage
from wsserver.errors import StoreError
from wsserver.generation import Log
from wsserver.hub import journal
from wsserver.hub.journal import Journal, Record
from wsserver.protocol import Done, Prompt, Terminal
from wsserver.stores import MemoryStore
from wsserver.stores.base import Entry, Header, StoredGeneration, Unsavable
from wsserver.telemetry import Metrics

FAILURES: dict[str, BaseException] = {
    "the store's": StoreError("disk"),
    "a fault": ZeroDivisionError("secret"),
    "out of memory": MemoryError(),
    "cancelled": asyncio.CancelledError(),
}


class Scripted(MemoryStore):
    """A store that fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: BaseException | None = None
        self.gate: asyncio.Event | None = None
        self.commits = 0
        self.probes = 0

    async def commit(self, entries: Sequence[Entry]) -> None:
        self.commits += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        await super().commit(entries)

    async def probe(self) -> None:
        self.probes += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure


class Stand:
    """A journal with its store. ``told`` has whether each end was saved."""

    def __init__(self, **options: float) -> None:
        self.store = Scripted()
        options = {"interval": 0.0001, "timeout": BOUND} | options
        self.journal = Journal(self.store, metrics=Metrics(), **options)
        self.told: dict[str, bool] = {}

    def begin(self, name: str = "g", *, waits: bool = False) -> Record:
        log: Log[Terminal] = Log()
        header = Header(name, "me", "c", Prompt(prompt="Hello?"), "m", 1.0)
        return self.journal.begin(header, log, waits=waits)

    def end(self, record: Record) -> None:
        name = record.header.id
        end = Done(id=name, seq=1, reason="end_turn", usage=Usage())
        self.journal.save_end(record, end, lambda saved: self.told.update({name: saved}))

    async def stored(self, name: str = "g") -> list[str] | None:
        found = await self.store.find("me", name)
        return heard(found.pieces) if isinstance(found, StoredGeneration) else None


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    yield stand
    await stand.journal.close(BOUND)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_writer_survives_every_failure_and_saves_everything_later(
    stand: Stand, failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    stand.store.failure = failure
    record = stand.begin()
    record.log.append("x")
    stand.end(record)
    await until(lambda: stand.told)
    assert stand.told == {"g": False}
    stand.store.failure = None
    stand.end(stand.begin("h"))
    await until(lambda: len(stand.told) == 2)
    assert stand.told == {"g": False, "h": True}
    assert (await stand.stored("g"), await stand.stored("h")) == (["x"], [])
    assert caplog.text.count("batch not saved") == 1
    assert caplog.text.count("store saves again") == 1
    assert "secret" not in caplog.text


@pytest.mark.parametrize("when", ["after a failed batch", "during a batch", "before a batch"])
async def test_abandoned_generations_are_never_saved(stand: Stand, when: str) -> None:
    stand.store.failure = StoreError("disk")
    ended, running = stand.begin(), stand.begin("h")
    for record in (ended, running):
        record.log.append("x")
    if when != "before a batch":
        stand.store.gate = None if when == "after a failed batch" else asyncio.Event()
        stand.end(ended)
        await until(lambda: stand.store.commits)
    if when == "after a failed batch":
        await until(lambda: stand.told)
    stand.journal.abandon()
    if when == "before a batch":
        stand.end(ended)
    if stand.store.gate is not None:
        stand.store.gate.set()
    await until(lambda: stand.told)
    assert stand.told == {"g": False}
    await until(lambda: not stand.journal.unsaved)
    stand.store.failure = None
    running.log.append("y")
    stand.end(running)
    stand.end(stand.begin("later"))
    await until(lambda: len(stand.told) == 3)
    assert stand.told == {"g": False, "h": False, "later": True}
    assert (await stand.stored("g"), await stand.stored("h")) == (None, None)
    assert stand.journal.find("me", "g") is None


async def test_writer_survives_any_number_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LONGEST_PAUSE", 0.0)
    stand = Stand(interval=1e-9)
    stand.store.failure = StoreError("disk")
    stand.begin()
    await until(lambda: stand.store.commits > 2000)  # 2.0**1024 is too large for a float
    with pytest.raises(StoreError):
        await stand.journal.probe()
    stand.store.failure = None
    stand.end(stand.begin("h"))
    await until(lambda: stand.told)
    assert stand.told == {"h": True}
    await stand.journal.probe()
    await stand.journal.close(BOUND)


@pytest.mark.parametrize("where", ["entry", "saved", "wake"])
async def test_every_generation_ends_after_exception_in_journal(
    stand: Stand, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = stand.begin()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(Record, where, broken)
        stand.end(record)
        stand.end(stand.begin("h"))
        await until(lambda: len(stand.told) == 2)
    stand.end(stand.begin("i"))
    await until(lambda: len(stand.told) == 3)
    assert stand.told["i"]
    assert "secret" not in caplog.text
    assert await stand.stored("g") == []


async def test_failing_end_callback_does_not_delay_others(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(saved: bool) -> None:
        raise ZeroDivisionError("secret")

    first, second = stand.begin("g"), stand.begin("h")
    end = Done(id="g", seq=0, reason="end_turn", usage=Usage())
    stand.journal.save_end(first, end, broken)
    stand.end(second)
    await until(lambda: stand.told)
    assert stand.told == {"h": True}
    assert "callback of saved reply failed" in caplog.text
    assert "secret" not in caplog.text
    assert await stand.stored("g") == []


async def test_unsaved_replies_are_kept_up_to_count_and_size(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_KEPT", 4)
    monkeypatch.setattr(journal, "MOST_KEPT_SIZE", 100_000)
    stand.store.failure = StoreError("disk")
    running = stand.begin("running")
    for number in range(6):
        record = stand.begin(f"g{number}")
        record.log.append("x")
        stand.end(record)
    await until(lambda: len(stand.told) == 6)
    kept = [number for number in range(6) if stand.journal.find("me", f"g{number}") is not None]
    assert kept == [2, 3, 4, 5]
    assert stand.journal.unsaved == 5  # with the one that runs
    for number in range(6, 8):
        record = stand.begin(f"g{number}")
        record.log.append("🎈" * 20_000)  # a str with an emoji has four bytes a character
        stand.end(record)
    await until(lambda: len(stand.told) == 8)
    await until(lambda: stand.journal.unsaved == 2)
    stand.store.failure = None
    stand.end(running)
    await until(lambda: len(stand.told) == 9)
    assert await stand.stored("g7") == ["🎈" * 20_000]
    assert await stand.stored("g6") is None


async def test_turns_are_saved_in_prompt_order_after_failure(
    stand: Stand,
) -> None:
    stand.store.failure = StoreError("disk")
    names = ["one", "two", "three"]
    for number, name in enumerate(names):
        record = stand.begin(name)
        await until(lambda number=number: stand.store.commits > number)  # type: ignore[misc]
        stand.end(record)
    stand.store.failure = None
    await stand.journal.flush()
    await until(lambda: not stand.journal.unsaved)
    stored = await stand.store.load("me", "c", limit=10, size=10_000)
    assert stored is not None
    assert [turn.id for turn in stored.turns] == names


async def test_failed_batch_does_not_restore_deleted_conversation(stand: Stand) -> None:
    stand.store.gate = asyncio.Event()
    stand.store.failure = StoreError("disk")
    stand.begin()
    await until(lambda: stand.store.commits)
    stand.journal.mark_deleted("me", "c")  # while the batch has the record
    stand.store.gate.set()
    await until(lambda: stand.store.commits > 1)
    stand.store.failure = None
    before = stand.store.commits
    await until(lambda: stand.store.commits > before)
    await stand.journal.flush()
    assert await stand.stored() is None


async def test_unsaved_ended_reply_is_found_in_journal(stand: Stand) -> None:
    stand.store.failure = StoreError("disk")
    record = stand.begin()
    record.log.append("x")
    assert stand.journal.find("me", "g") is None
    stand.end(record)
    await until(lambda: stand.told)
    found = stand.journal.find("me", "g")
    assert found is not None
    assert found.terminal is not None
    assert (heard(found.pieces), found.terminal.saved) == (["x"], False)
    assert stand.journal.find("somebody else", "g") is None
    assert stand.journal.has_late("me", "c")
    stand.store.failure = None
    await stand.journal.flush()
    await until(lambda: not stand.journal.has_late("me", "c"))
    assert stand.journal.find("me", "g") is None
    assert await stand.stored() == ["x"]


async def test_unsaved_reply_of_deleted_conversation_is_not_found(
    stand: Stand,
) -> None:
    stand.store.failure = StoreError("disk")
    stand.end(stand.begin())
    await until(lambda: stand.told)
    stand.store.gate = asyncio.Event()
    commits = stand.store.commits
    await until(lambda: stand.store.commits > commits)
    stand.journal.mark_deleted("me", "c")  # while a batch has the record
    stand.store.gate.set()
    commits = stand.store.commits
    await until(lambda: stand.store.commits > commits)
    assert stand.journal.find("me", "g") is None
    assert not stand.journal.has_late("me", "c")


async def test_queued_prompt_is_saved_at_once() -> None:
    stand = Stand(interval=3600.0)
    stand.begin("runs")
    stand.begin("waits", waits=True)
    await until(lambda: stand.store.commits)
    assert await stand.stored("waits") == []
    await stand.journal.close(BOUND)


async def test_probe_writes_at_most_once_per_second(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "PROBE_EVERY", 1000.0)
    await asyncio.gather(*(stand.journal.probe() for _ in range(50)))
    await stand.journal.probe()
    assert stand.store.probes == 1
    monkeypatch.setattr(journal, "PROBE_EVERY", 0.0)
    stand.store.failure = StoreError("disk")
    for probes in (2, 3):
        with pytest.raises(StoreError):
            await stand.journal.probe()
        assert stand.store.probes == probes
    assert caplog.text.count("store cannot save reason=disk") == 1
    stand.store.failure = None
    await stand.journal.probe()


async def test_hanging_probe_is_not_repeated(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PROBE_EVERY", 0.0)
    stand.store.gate = asyncio.Event()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await stand.journal.probe()
    assert stand.store.probes == 1
    stand.store.gate.set()
    await stand.journal.probe()


async def test_probe_fails_without_write_while_journal_fails(stand: Stand) -> None:
    stand.store.failure = StoreError("disk")
    stand.end(stand.begin())
    await until(lambda: stand.told)
    with pytest.raises(StoreError):
        await stand.journal.probe()
    assert stand.store.probes == 0
    stand.store.failure = None
    await until(lambda: not stand.journal.unsaved)
    await stand.journal.flush()
    await stand.journal.probe()
    assert stand.store.probes == 1


async def test_record_size_is_memory_of_pieces(stand: Stand) -> None:
    record = stand.begin()
    record.log.append("x" * 1000)
    record.log.append("🎈" * 1000)
    record.log.append("é" * 1000, "thinking", 1)
    assert 1000 + 4000 + 1000 < record.size < 1000 + 4000 + 1000 + 500


async def test_unsavable_reply_does_not_delay_others(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = MemoryStore.commit

    async def picky(self: MemoryStore, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if "bad" in entry.pieces.data:
                raise Unsavable(entry, "OverflowError")
        await commit(self, entries)

    monkeypatch.setattr(MemoryStore, "commit", picky)
    first, bad, last = (stand.begin(name) for name in ("first", "bad", "last"))
    bad.log.append("bad")
    await until(lambda: bad.lost)
    bad.log.append("more")
    for record in (first, bad, last):
        stand.end(record)
    await until(lambda: len(stand.told) == 3)
    assert stand.told == {"first": True, "bad": False, "last": True}
    assert not stand.journal.unsaved
    await stand.journal.probe()
    assert caplog.text.count("reply not saved id=bad reason=OverflowError") == 1
    stored = await stand.store.load("me", "c", limit=10, size=1000)
    assert stored is not None
    assert [turn.id for turn in stored.turns] == ["first", "last"]
