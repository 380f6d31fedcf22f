"""The position of one client in the log of one generation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from wsserver.dialects import Dialect
from wsserver.hub.live import Generation
from wsserver.pieces import Run


class Sink(Protocol):
    """Where a cursor writes."""

    @property
    def writable(self) -> bool:
        """Whether more data may be written: the client reads fast enough."""
        ...

    def write(self, frame: bytes) -> None:
        """Send a frame, or buffer it. Do nothing if the client has disconnected."""
        ...


class Reader(Protocol):
    """The owner of a cursor."""

    def merged(self, pieces: int) -> None:
        """Note that one frame had several pieces."""
        ...

    def leave(self, cursor: "Cursor") -> None:
        """Stop following the generation: its terminal was written."""
        ...

    def fail(self, error: Exception) -> None:
        """Close the connection: the cursor failed."""
        ...


@dataclass(eq=False, slots=True)
class Cursor:
    """Follows a log for one client, and writes pieces as fast as the client reads."""

    generation: Generation
    _sink: Sink
    _dialect: Dialect
    _reader: Reader  # notified of the end
    limit: int  # characters of merged text in a frame
    own: bool = False  # this client sent the prompt
    # This client asked for the generation by `prompt` or `resume`. It still follows the generation
    # after closing the conversation.
    asked: bool = False
    # Makes the first frame, which is written before all others; None once it is written.
    start: Callable[[], bytes] | None = None
    seq: int = 0  # the seq of the last piece that was written

    @property
    def behind(self) -> bool:
        """Whether the log has something that was not written yet."""
        log = self.generation.log
        return self.start is not None or self.seq < log.seq or log.terminal is not None

    def begin(self, after: int, limit: int, *, shown: bool, request: str | None) -> None:
        """Continue after a piece, beginning with a ``start``; see :meth:`Dialect.start`."""
        if self.start is not None:  # the `start` for an earlier frame was not written yet
            self._sink.write(self.start())
        generation, dialect = self.generation, self._dialect
        self.start = lambda: dialect.start(generation, after=after, shown=shown, request=request)
        self.seq, self.limit = after, limit
        self.wake()

    def wake(self) -> None:
        """Write new pieces while the client reads. A failure closes only this client."""
        generation, sink = self.generation, self._sink
        log = generation.log
        try:
            while sink.writable:
                if self.start is not None:
                    start, self.start = self.start, None
                    sink.write(start())
                elif self.seq < (last := len(log.pieces.data)):
                    run, frame = self._next()
                    if run.seq - self.seq > 1:
                        self._reader.merged(run.seq - self.seq)
                    self.seq = run.seq
                    sink.write(frame)
                    if run.seq == last and log.terminal is None:
                        return
                elif log.terminal is not None:
                    sink.write(self._dialect.terminal(log.terminal))
                    self._reader.leave(self)
                    return
                else:
                    return
        except Exception as error:  # noqa: BLE001
            self._reader.fail(error)

    def _next(self) -> tuple[Run, bytes]:
        """Return the run after the cursor, and its frame.

        Cursors at the same position share one frame.
        """
        generation = self.generation
        if generation.readers == 1:
            run = generation.log.pieces.read(self.seq, self.limit)
            return run, self._dialect.run(generation, run)
        place = self.seq, generation.log.seq, self.limit, self._dialect
        if generation.shared is None or generation.shared[0] != place:
            run = generation.log.pieces.read(self.seq, self.limit)
            generation.shared = place, run, self._dialect.run(generation, run)
        return generation.shared[1:]
