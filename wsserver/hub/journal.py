"""Saves generations to the store. The journal follows all logs, and writes in batches.

Pieces do not wait for the store. A terminal does: the journal saves a terminal before any client
gets it. So a crash cannot undo the end of a reply that a client has seen.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wsserver.errors import StoreError
from wsserver.generation import Log
from wsserver.logs import log
from wsserver.protocol import Terminal
from wsserver.stores.base import Entry, Fenced, Header, Store, StoredGeneration, Unsavable
from wsserver.telemetry import Metrics

LONGEST_PAUSE = 5.0  # seconds between two attempts to save a failed batch
MOST_DOUBLINGS = 16  # of the pause between two attempts
MOST_KEPT = 1000  # ended generations that wait to be saved; the oldest ones are dropped first
MOST_KEPT_SIZE = 67_108_864  # bytes of their pieces
PROBE_EVERY = 1.0  # least seconds between two probes; any client may request a probe


def _ignore(_: bool) -> None:  # noqa: FBT001
    """Do nothing: the callback was already called."""


@dataclass(eq=False, slots=True)
class Record:
    """The progress of saving one generation. A follower of its log."""

    _journal: "Journal"
    header: Header  # what was accepted
    log: Log[Terminal]  # the pieces
    new: bool = True  # the store has to create the generation
    queued: bool = False  # the next batch saves the record, with all pieces that it has by then
    lost: bool = False  # no attempt can save it
    deleted: bool = False  # its conversation was deleted
    terminal: Terminal | None = None  # its end; None until `Journal.save_end`
    withdrawn: bool = False  # the prompt was taken back before the model was asked
    on_saved: Callable[[bool], None] = _ignore  # called once with whether the end was saved
    _saved: int = 0  # the seq of the last piece that is saved
    _size: int = -1  # bytes of the pieces; -1 until they are counted

    def wake(self) -> None:
        """Save the new piece with the next batch."""
        if not self.queued:
            self.queued = True
            self._journal.enqueue(self)

    def entry(self) -> Entry:
        """Return what is not saved yet; the whole reply once it has ended."""
        after = self._saved if self.terminal is None else 0  # the store joins the pieces at the end
        pieces = self.log.pieces.after(after)
        return Entry(self.header, self.new, after, pieces, self.terminal, self.withdrawn)

    def saved(self, entry: Entry) -> None:
        """Note that an entry is saved."""
        self.new = False
        self._saved = entry.after + len(entry.pieces)

    def within(self, owner: str, conversation: str) -> bool:
        """Whether the generation belongs to a conversation."""
        return (self.header.owner, self.header.conversation) == (owner, conversation)

    @property
    def size(self) -> int:
        """Bytes of the pieces of an ended generation in memory."""
        if self._size < 0:
            self._size = sum(map(sys.getsizeof, self.log.pieces.data))
        return self._size


class Journal:
    """The one writer of a store.

    Args:
        store: where to save.
        interval: seconds between two batches, unless a terminal waits.
        timeout: seconds for a batch, after which its terminals go to the clients as not saved.
        metrics: the numbers to count in.
    """

    def __init__(self, store: Store, interval: float, timeout: float, metrics: Metrics) -> None:
        self._store = store
        self._interval = interval
        self._timeout = timeout
        self._metrics = metrics
        self._batch: list[Record] = []  # the records of the batch under way
        self._unsaved: dict[Record, None] = {}  # the others with something to save, in order
        self._late: dict[Record, None] = {}  # ended, and still to be saved after a failure
        self._urgent = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._probe_failed = False  # the last probe failed
        self._probed = 0.0  # when the last probe began, by the event loop's clock
        self._batch_ended: asyncio.Future[None] | None = None  # done when the batch under way ends
        self._failures = 0  # in a row
        self._closed = False

    def begin(self, header: Header, log: Log[Terminal], *, waits: bool = False) -> Record:
        """Begin to save a generation.

        Args:
            header: what was accepted.
            log: the pieces to come.
            waits: the prompt waits for another reply. Then it is saved at once, because no piece
                arrives that would start a batch.
        """
        record = Record(self, header, log)
        log.followers.append(record)
        if waits:
            self._urgent.set()
        self.enqueue(record)
        return record

    def save_end(
        self,
        record: Record,
        terminal: Terminal,
        on_saved: Callable[[bool], None],
        *,
        withdrawn: bool = False,
    ) -> None:
        """Save the end of a generation at once.

        Args:
            record: which generation.
            terminal: its end.
            on_saved: called with whether the end was saved.
            withdrawn: the prompt was taken back before the model was asked.
        """
        record.log.followers.remove(record)
        record.terminal, record.on_saved, record.withdrawn = terminal, on_saved, withdrawn
        if record.lost:
            asyncio.get_running_loop().call_soon(lambda: self._notify([record], saved=False))
            return
        self._urgent.set()
        self.enqueue(record)

    def enqueue(self, record: Record) -> None:
        """Save the new part of a generation with the next batch."""
        if record.lost:
            return
        self._unsaved[record] = None
        if self._writer is None and not self._closed:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    def now(self) -> float:
        """Return the time of the store, in seconds since the epoch."""
        return self._store.now()

    @property
    def unsaved(self) -> int:
        """The number of generations with something to save, those of a batch under way included."""
        return len({*self._batch, *self._unsaved})

    def find(self, owner: str, generation_id: str) -> StoredGeneration | None:
        """Return an ended generation that could not be saved yet."""
        for record in self._late:
            if (record.header.owner, record.header.id) == (owner, generation_id):
                assert record.terminal is not None
                terminal = record.terminal.model_copy(update={"saved": False})
                return StoredGeneration(record.header, record.log.pieces, terminal)
        return None

    def has_late(self, owner: str, conversation: str) -> bool:
        """Whether an ended generation of a conversation could not be saved yet."""
        return any(record.within(owner, conversation) for record in self._late)

    def mark_deleted(self, owner: str, conversation: str) -> None:
        """Mark the records of a deleted conversation, so that they do not create it again."""
        for record in (*self._batch, *self._unsaved):
            if record.within(owner, conversation):
                record.new, record.deleted = False, True
                self._late.pop(record, None)

    def abandon(self) -> None:
        """Save nothing of the generations so far: other nodes have ended them."""
        records, self._unsaved = [*self._batch, *self._unsaved], {}
        for record in records:
            record.lost = True
        self._notify(records, saved=False)

    async def flush(self) -> None:
        """Wait until everything up to now is saved, or an attempt to save it has failed."""
        # The batch under way may lack the newest pieces. The batch after it has them.
        for _ in range(2):
            if self._writer is None:
                return
            self._urgent.set()
            if self._batch_ended is None:
                self._batch_ended = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._batch_ended)

    async def probe(self) -> None:
        """Check with a write that the store works, once a second at most.

        If the last batch failed, no write is needed: the journal already tries again.

        Raises:
            StoreError: the store does not save.
        """
        if self._failures:
            raise StoreError("the last batch could not be saved")
        now = asyncio.get_running_loop().time()
        if self._probe is None or (self._probe.done() and now - self._probed >= PROBE_EVERY):
            self._probed = now
            self._probe = asyncio.get_running_loop().create_task(self._store.probe())
            self._probe.add_done_callback(self._on_probe_done)
        await asyncio.shield(self._probe)

    async def close(self, within: float) -> None:
        """Save the rest within some seconds, and stop writing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.flush()
        self._closed = True
        tasks = {task for task in (self._writer, self._probe) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=within)

    async def _write(self) -> None:
        """Write batch after batch until nothing is left.

        No exception in the store, in a follower or in the journal ends the writer: without the
        writer no generation gets its terminal.
        """
        try:
            while self._unsaved:
                await self._pause()
                records, self._unsaved = list(self._unsaved), {}
                for record in records:
                    record.queued = False
                self._batch = records
                try:
                    await self._save(records)
                except Exception as error:  # noqa: BLE001
                    self._fail(records, error)
                self._batch = []
                self._end_batch()
        finally:
            self._writer = None
            self._end_batch()

    async def _pause(self) -> None:
        # The pause grows with each failure, because each attempt writes the whole batch again.
        doublings = min(self._failures, MOST_DOUBLINGS)
        pause = max(self._interval, min(LONGEST_PAUSE, self._interval * 2**doublings))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._urgent.wait()
        self._urgent.clear()

    async def _save(self, records: list[Record]) -> None:
        entries = [record.entry() for record in records]
        # A slow commit is not cancelled: its thread would continue, and two commits must not run at
        # once. Terminals that arrive during a slow commit are sent as not saved, and saved later.
        began = time.monotonic()
        commit = asyncio.ensure_future(self._store.commit(entries))
        while not (await asyncio.wait({commit}, timeout=self._timeout))[0]:
            self._report(StoreError("it takes too long"))
            self._notify([*records, *self._unsaved], saved=False)
            self._end_batch()
        error = asyncio.CancelledError() if commit.cancelled() else commit.exception()
        self._metrics.commit_took(time.monotonic() - began, saved=error is None)
        if error is not None:
            self._fail(records, error)
            return
        if self._failures:
            log.warning("store saves again")
        self._failures = 0
        for record, entry in zip(records, entries, strict=True):
            record.saved(entry)
        ended = [
            record
            for record, entry in zip(records, entries, strict=True)
            if entry.terminal is not None  # a record may have ended since the batch was taken
        ]
        self._notify(ended, saved=True)

    def _fail(self, records: list[Record], error: BaseException) -> None:
        """Report a failed batch, and try again with the next one."""
        if isinstance(error, Unsavable):
            (bad,) = (record for record in records if record.header is error.entry.header)
            log.error("reply not saved", id=bad.header.id, reason=str(error))
            bad.lost = True
            self._notify([bad], saved=False)
            self._unsaved = dict.fromkeys(r for r in records if r is not bad) | self._unsaved
            self._urgent.set()
            return
        self._report(error)
        if isinstance(error, Fenced):  # another node has ended these replies
            for record in records:
                record.lost = True
        self._notify(records, saved=False)
        self._requeue([record for record in records if not record.lost])

    def _requeue(self, records: list[Record]) -> None:
        """Put a batch back in front. The oldest ended records over the bounds are dropped."""
        self._unsaved = dict.fromkeys(records) | self._unsaved
        kept = size = 0
        for record in reversed(list(self._unsaved)):
            if record.terminal is not None:
                kept += 1
                size += record.size
                if kept > MOST_KEPT or size > MOST_KEPT_SIZE:
                    del self._unsaved[record]
                    self._late.pop(record, None)

    def _notify(self, records: Iterable[Record], *, saved: bool) -> None:
        for record in records:
            if record.terminal is not None:
                if saved or record.lost or record.deleted:
                    self._late.pop(record, None)
                else:
                    self._late[record] = None
                notify, record.on_saved = record.on_saved, _ignore
                try:
                    notify(saved)
                except Exception as error:  # noqa: BLE001
                    log.error("callback of saved reply failed", failure=error)

    def _end_batch(self) -> None:
        if self._batch_ended is not None:
            self._batch_ended.set_result(None)
            self._batch_ended = None

    def _on_probe_done(self, probe: "asyncio.Task[None]") -> None:
        """Log why the store does not save, once per outage."""
        error = None if probe.cancelled() else probe.exception()
        if isinstance(error, StoreError) and not self._probe_failed:
            log.error("store cannot save", reason=str(error))
        self._probe_failed = error is not None

    def _report(self, error: BaseException) -> None:
        if not self._failures:  # once per outage
            expected = isinstance(error, StoreError)
            log.error(
                "batch not saved",
                reason=str(error) if expected else None,
                failure=None if expected else error,
            )
        self._failures += 1
