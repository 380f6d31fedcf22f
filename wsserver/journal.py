"""Saves what logs say: a follower of each, which writes for all of them in batches.

The stream never waits for it. A terminal does: it is saved before anyone is told, so that no
client knows of an end that a crash could undo.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from wsserver.errors import StoreError
from wsserver.generation import Log
from wsserver.protocol import Terminal
from wsserver.stores.base import Entry, Header, Store

__all__ = ["Journal", "Record"]

logger = logging.getLogger("wsserver")


class Record:
    """How far one generation is saved. A follower of its log."""

    __slots__ = ("_journal", "_new", "_saved", "header", "log", "on_saved", "terminal")

    def __init__(self, journal: "Journal", header: Header, log: Log[Terminal]) -> None:
        self._journal = journal
        self._new = True
        self._saved = 0  # the seq up to which it is saved
        self.header = header
        self.log = log
        self.terminal: Terminal | None = None
        self.on_saved: Callable[[bool], None] = _nobody

    def wake(self) -> None:
        """There is more to save, in a while."""
        self._journal.note(self)

    def entry(self) -> Entry:
        """Return what is not saved yet."""
        pieces = self.log.pieces[self._saved :]
        return Entry(self.header, self._new, self._saved, pieces, self.terminal)

    def saved(self, entry: Entry) -> None:
        """What :meth:`entry` returned has been saved."""
        self._new = False
        self._saved = entry.after + len(entry.pieces)


class Journal:
    """The one writer of a store.

    Args:
        store: where to.
        interval: seconds between two batches, unless a terminal is waiting.
        timeout: seconds for a batch, after which its terminals go out as not saved.
        keep: seconds that generations outside of conversations are kept.
    """

    def __init__(self, store: Store, interval: float, timeout: float, keep: float) -> None:
        self._store = store
        self._interval = interval
        self._timeout = timeout
        self._unsaved: dict[Record, None] = {}  # in the order in which it came
        self._urgent = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._batch: asyncio.Future[None] | None = None  # done when the batch under way is
        self._failing = False
        self._keep = keep
        self._purge_at = 0.0

    def begin(self, header: Header, log: Log[Terminal]) -> Record:
        """Save a generation from its beginning on."""
        record = Record(self, header, log)
        log.followers.append(record)
        self.note(record)
        return record

    def end(self, record: Record, terminal: Terminal, on_saved: Callable[[bool], None]) -> None:
        """Save the end of a generation at once, and say whether that went well."""
        record.log.followers.remove(record)
        record.terminal, record.on_saved = terminal, on_saved
        self._urgent.set()
        self.note(record)

    def note(self, record: Record) -> None:
        """Save what is new of a generation with the next batch."""
        self._unsaved[record] = None
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

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

    async def _write(self) -> None:
        """Write batch after batch until nothing is left."""
        try:
            while self._unsaved:
                await self._pause()
                records, self._unsaved = list(self._unsaved), {}
                await self._save(records)
                if self._batch is not None:
                    self._batch.set_result(None)
                    self._batch = None
        finally:
            self._writer = None

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._interval):
                await self._urgent.wait()
        except TimeoutError:
            pass
        self._urgent.clear()

    async def _save(self, records: list[Record]) -> None:
        entries = [record.entry() for record in records]
        # Not cancelled when it takes too long: it goes on in its thread anyway, and there must
        # not be two at once.
        commit = asyncio.ensure_future(self._store.commit(entries))
        await asyncio.wait({commit}, timeout=self._timeout)
        if not commit.done():
            self._report("it takes too long")
            self._tell(records, entries, saved=False)
            await asyncio.wait({commit})
        try:
            commit.result()
            await self._purge()
        except Exception as error:
            if isinstance(error, StoreError):
                self._report(str(error))
            else:
                logger.exception("the store failed")
            self._tell(records, entries, saved=False)
            for record, entry in zip(records, entries, strict=True):
                if entry.terminal is None:
                    self._unsaved.setdefault(record)  # again with the next batch
        else:
            self._failing = False
            for record, entry in zip(records, entries, strict=True):
                record.saved(entry)
            self._tell(records, entries, saved=True)

    @staticmethod
    def _tell(records: list[Record], entries: list[Entry], *, saved: bool) -> None:
        for record, entry in zip(records, entries, strict=True):
            if entry.terminal is not None:  # and not only since the batch was taken
                tell, record.on_saved = record.on_saved, _nobody
                tell(saved)

    async def _purge(self) -> None:
        """Now and then delete what nobody can ask for any more."""
        now = time.time()
        if now >= self._purge_at:
            self._purge_at = now + self._keep
            with contextlib.suppress(StoreError):
                await self._store.purge(now - self._keep)

    def _report(self, why: str) -> None:
        if not self._failing:  # once per outage, and not once per batch
            logger.error("conversations cannot be saved: %s", why)
        self._failing = True


def _nobody(_: bool) -> None:  # noqa: FBT001
    """Tell nobody, once it has been told."""
