"""Saves what logs say: a follower of each, which writes for all of them in batches.

The stream never waits for it. A terminal does: it is saved before anyone is told, so that no
client knows of an end that a crash could undo.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from wsserver.errors import StoreError
from wsserver.generation import Log
from wsserver.logs import log
from wsserver.protocol import Terminal
from wsserver.stores.base import Entry, Header, Store
from wsserver.telemetry import Metrics

__all__ = ["Journal", "Record"]

LONGEST_PAUSE = 5.0  # seconds between two tries to save what could not be saved
MOST_KEPT = 1000  # ended generations that wait to be saved after all


class Record:
    """How far one generation is saved. A follower of its log."""

    __slots__ = ("_journal", "_saved", "header", "log", "new", "on_saved", "terminal", "unsaid")

    def __init__(self, journal: "Journal", header: Header, log: Log[Terminal]) -> None:
        self._journal = journal
        self.new = True  # the store has to make the generation
        self._saved = 0  # the seq up to which it is saved
        self.header = header
        self.log = log
        self.terminal: Terminal | None = None
        self.unsaid = False
        self.on_saved: Callable[[bool], None] = _nobody

    def wake(self) -> None:
        """There is more to save, in a while."""
        self._journal.note(self)

    def entry(self) -> Entry:
        """Return what is not saved yet."""
        pieces = self.log.pieces[self._saved :]
        return Entry(self.header, self.new, self._saved, pieces, self.terminal, self.unsaid)

    def saved(self, entry: Entry) -> None:
        """What :meth:`entry` returned has been saved."""
        self.new = False
        self._saved = entry.after + len(entry.pieces)


class Journal:
    """The one writer of a store.

    Args:
        store: where to.
        interval: seconds between two batches, unless a terminal is waiting.
        timeout: seconds for a batch, after which its terminals go out as not saved.
        keep: seconds that ended generations outside of conversations are kept.
        metrics: what learns how long the store takes.
    """

    def __init__(
        self, store: Store, interval: float, timeout: float, keep: float, metrics: Metrics
    ) -> None:
        self._store = store
        self._interval = interval
        self._timeout = timeout
        self._keep = keep
        self._metrics = metrics
        self._unsaved: dict[Record, None] = {}  # in the order in which it came
        self._urgent = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._purger: asyncio.Task[None] | None = None
        self._batch: asyncio.Future[None] | None = None  # done when the batch under way is
        self._failures = 0  # in a row
        self._closed = False

    def begin(self, header: Header, log: Log[Terminal]) -> Record:
        """Save a generation from its beginning on."""
        record = Record(self, header, log)
        log.followers.append(record)
        self.note(record)
        return record

    def end(
        self,
        record: Record,
        terminal: Terminal,
        on_saved: Callable[[bool], None],
        *,
        unsaid: bool = False,
    ) -> None:
        """Save the end of a generation at once.

        Args:
            record: which generation.
            terminal: its end.
            on_saved: called with whether the end was saved.
            unsaid: the prompt was taken back before the model was asked.
        """
        record.log.followers.remove(record)
        record.terminal, record.on_saved, record.unsaid = terminal, on_saved, unsaid
        self._urgent.set()
        self.note(record)

    def note(self, record: Record) -> None:
        """Save what is new of a generation with the next batch."""
        self._unsaved[record] = None
        if self._writer is None and not self._closed:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    def deleted(self, owner: str, conversation: str) -> None:
        """Let what could not be saved before the conversation was deleted not bring it back."""
        for record in self._unsaved:
            if (record.header.owner, record.header.conversation) == (owner, conversation):
                record.new = False

    async def flush(self) -> None:
        """Wait until all that was said before now is saved, or could not be."""
        # The batch under way may have been taken before; the one after it has all there is.
        for _ in range(2):
            if self._writer is None:
                return
            self._urgent.set()
            if self._batch is None:
                self._batch = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._batch)

    def purge(self) -> None:
        """Have deleted what nobody can ask for any more, by and by."""
        if self._purger is None and not self._closed:
            self._purger = asyncio.get_running_loop().create_task(self._purge())

    async def close(self, within: float) -> None:
        """Save what is left, if it can be done in so many seconds, and write no more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.flush()
        self._closed = True
        tasks = {task for task in (self._writer, self._purger) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=within)

    async def _write(self) -> None:
        """Write batch after batch until nothing is left."""
        try:
            while self._unsaved:
                await self._pause()
                records, self._unsaved = list(self._unsaved), {}
                await self._save(records)
                self._tell_batch()
        finally:
            self._writer = None
            self._tell_batch()

    async def _pause(self) -> None:
        # Ever longer while nothing can be saved, as all of it is tried again each time.
        pause = min(LONGEST_PAUSE, self._interval * 2**self._failures)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(pause, self._interval)):
                await self._urgent.wait()
        self._urgent.clear()

    async def _save(self, records: list[Record]) -> None:
        entries = [record.entry() for record in records]
        # Not cancelled when it takes too long: it goes on in its thread anyway, and there must
        # not be two at once. Who comes meanwhile is told that it is not saved, and is, later.
        began = time.monotonic()
        commit = asyncio.ensure_future(self._store.commit(entries))
        while not (await asyncio.wait({commit}, timeout=self._timeout))[0]:
            self._report(reason="it takes too long")
            late = list(self._unsaved)
            self._tell(records + late, entries + [record.entry() for record in late], saved=False)
            self._tell_batch()
        saved = not commit.cancelled() and commit.exception() is None
        self._metrics.commit_took(time.monotonic() - began, saved=saved)
        try:
            commit.result()
        except Exception as error:  # noqa: BLE001
            if isinstance(error, StoreError):
                self._report(reason=str(error))
            else:
                self._report(failure=error)
            self._tell(records, entries, saved=False)
            self._keep_for_later(records)
        else:
            self._failures = 0
            for record, entry in zip(records, entries, strict=True):
                record.saved(entry)
            self._tell(records, entries, saved=True)

    def _keep_for_later(self, records: list[Record]) -> None:
        """Try again with the next batch, ended ones too, of which only so many are kept."""
        self._unsaved = dict.fromkeys(records) | self._unsaved
        ended = [record for record in self._unsaved if record.terminal is not None]
        for record in ended[:-MOST_KEPT]:
            del self._unsaved[record]

    @staticmethod
    def _tell(records: list[Record], entries: list[Entry], *, saved: bool) -> None:
        for record, entry in zip(records, entries, strict=True):
            if entry.terminal is not None:  # and not only since the batch was taken
                tell, record.on_saved = record.on_saved, _nobody
                tell(saved)

    def _tell_batch(self) -> None:
        if self._batch is not None:
            self._batch.set_result(None)
            self._batch = None

    async def _purge(self) -> None:
        try:
            await self._store.purge(time.time() - self._keep)
        except Exception as error:  # noqa: BLE001
            if not isinstance(error, StoreError):
                log.error("store not purged", failure=error)
        finally:
            self._purger = None

    def _report(self, **why: object) -> None:
        if not self._failures:  # once per outage, and not once per batch
            log.error("conversations cannot be saved", **why)
        self._failures += 1


def _nobody(_: bool) -> None:  # noqa: FBT001
    """Tell nobody, once it has been told."""
