"""Where one client is in the log of one generation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from wsserver.dialects import Dialect
from wsserver.live import Generation
from wsserver.pieces import Run


class Sink(Protocol):
    """Where a cursor writes."""

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        ...

    def write(self, frame: bytes) -> None:
        """Send a frame at once or buffer it. Does nothing once the client is gone."""
        ...


class Reader(Protocol):
    """Whose cursor it is."""

    def merged(self, pieces: int) -> None:
        """Note that one frame had several pieces."""
        ...

    def leave(self, cursor: "Cursor") -> None:
        """Follow the generation no more: its terminal was written."""
        ...

    def fail(self, error: Exception) -> None:
        """End the connection: the cursor cannot go on."""
        ...


@dataclass(eq=False, slots=True)
class Cursor:
    """Follows a log for one client, and writes what the client can take."""

    generation: Generation
    _sink: Sink
    _dialect: Dialect
    _reader: Reader  # learns of the end
    limit: int  # characters that a frame may merge
    own: bool = False  # this client sent the prompt
    # This client asked for the generation by `prompt` or `resume`, and goes on with it when it
    # closes the conversation.
    asked: bool = False
    # Makes the first frame, which is written before all others; None once it is written.
    start: Callable[[], bytes] | None = None
    seq: int = 0  # the seq of the last piece that was written

    @property
    def behind(self) -> bool:
        """Whether there is something to write."""
        log = self.generation.log
        return self.start is not None or self.seq < log.seq or log.terminal is not None

    def begin(self, after: int, limit: int, *, shown: bool, request: str | None) -> None:
        """Go on from a piece, after a ``start``; see :meth:`Dialect.start`."""
        if self.start is not None:  # the answer to an earlier frame, which had to wait
            self._sink.write(self.start())
        generation, dialect = self.generation, self._dialect
        self.start = lambda: dialect.start(generation, after=after, shown=shown, request=request)
        self.seq, self.limit = after, limit
        self.wake()

    def wake(self) -> None:
        """Write what is new, while the client keeps up. A failure ends this client alone."""
        generation, sink = self.generation, self._sink
        log = generation.log
        try:
            while sink.writable:
                if self.start is not None:
                    start, self.start = self.start, None
                    sink.write(start())
                elif self.seq < log.seq:
                    run, frame = self._next()
                    if run.seq - self.seq > 1:
                        self._reader.merged(run.seq - self.seq)
                    self.seq = run.seq
                    sink.write(frame)
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

        Cursors in the same place share one frame.
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
