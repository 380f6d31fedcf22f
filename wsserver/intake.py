"""The way of a model's pieces into the log: each is checked, cut to size and counted."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from wsserver.content import Usage
from wsserver.generation import End, State, tokens_in, well_formed
from wsserver.limits import Memory, held
from wsserver.live import Generation
from wsserver.models.base import Piece
from wsserver.protocol import StoppedBy
from wsserver.settings import Settings

__all__ = ["Intake"]

CHUNK = 65_536  # bytes of memory that a log takes at once, so that few pieces take any
PIECES_PER_TURN = 16  # of a model that never waits, before the event loop serves others

Stop = Callable[[Generation, StoppedBy], None]

_END_TURN = End()


class _Enough(Exception):
    """The reply has ended. The model's other pieces are dropped."""


class Intake:
    """Moves what a model says into the log of one generation.

    Args:
        generation: whose log.
        settings: the sizes of a reply and of its frames.
        memory: counts the bytes of the log.
        time: the event loop's clock.
        stop: stops a generation that nobody reads, once its unread tokens are over the limit.
    """

    __slots__ = (
        "_end",
        "_generation",
        "_half",
        "_left",
        "_memory",
        "_room",
        "_size",
        "_stop",
        "_time",
        "_unread_limit",
    )

    def __init__(
        self,
        generation: Generation,
        settings: Settings,
        memory: Memory,
        time: Callable[[], float],
        stop: Stop,
    ) -> None:
        self._generation = generation
        self._room = settings.reply_size
        self._size = settings.frame_size
        self._memory = memory
        self._left = 0  # bytes of memory that are taken and not used
        self._unread_limit = settings.grace_tokens
        self._time = time
        self._stop = stop
        self._half = ""  # a high surrogate that the next piece may complete
        self._end = _END_TURN

    async def run(self, answer: Awaitable[None]) -> End:
        """Wait for a model that pushes, or for :meth:`pull`, and return the end of the answer."""
        try:
            await answer
        except _Enough:
            pass
        except Exception:
            self._flush()
            raise
        self._flush()
        return self._end

    async def pull(self, pieces: AsyncIterator[Piece]) -> None:
        """Take all that a model yields, and close the model."""
        turn = 0
        try:
            async for piece in pieces:
                self.take(piece)
                turn += 1
                if turn == PIECES_PER_TURN:
                    turn = 0
                    await asyncio.sleep(0)
        finally:  # as contextlib.aclosing, but an iterator need not have `aclose`
            aclose = getattr(pieces, "aclose", None)
            if aclose is not None:
                await aclose()

    def take(self, piece: Piece) -> None:
        """Append text to the log, and note all else.

        Raises:
            _Enough: the reply has ended.
            TypeError: a model must not yield this.
        """
        generation = self._generation
        if isinstance(piece, Usage):  # counts after a stop too
            generation.usage = piece
        elif generation.state is not State.RUNNING:  # the model kept the cancellation to itself
            raise _Enough
        elif isinstance(piece, str):
            generation.heard = self._time()
            text = piece if piece.isascii() and not self._half else self._joined(piece)
            if text:
                self._append(text)
        elif isinstance(piece, End):
            self._end = piece
        else:
            raise TypeError(f"a model yielded {type(piece).__name__}")

    def _joined(self, piece: str) -> str:
        """Join a piece with the half of a surrogate pair from the piece before.

        A half at the end is kept for the next piece. A half without its other half becomes U+FFFD.
        """
        if not piece:
            return piece
        half = self._half
        if half and type(half) is not type(piece):
            self._flush()
            half = ""
        self._half = ""
        kind, text = type(piece), half + piece
        if "\ud800" <= text[-1] <= "\udbff":
            self._half = kind(text[-1])
            text = text[:-1]
        return well_formed(kind(text))

    def _flush(self) -> None:
        """Append the last half of a surrogate pair as U+FFFD: no other half came."""
        half, self._half = self._half, ""
        if half and self._generation.state is State.RUNNING:
            self._generation.log.append(well_formed(half))

    def _append(self, text: str) -> None:
        generation = self._generation
        self._left -= held(text)
        if self._left < 0:
            self._take_memory()
        if len(text) <= self._size and len(text) < self._room:
            generation.log.append(text)
            self._room -= len(text)
        else:
            self._append_in_parts(text)
        if generation.unread is not None:
            generation.unread += tokens_in(text)
            aware = generation.heard >= generation.unaware_until
            if aware and generation.unread > self._unread_limit:
                self._stop(generation, "disconnect")
        if self._room <= 0:
            self._end = End("max_tokens")
            raise _Enough

    def _take_memory(self) -> None:
        """Take memory for this piece and the next ones. The first piece always does.

        Raises:
            _Enough: there is no memory. The reply ends with the reason ``max_tokens``.
        """
        generation, size = self._generation, CHUNK - self._left
        if not self._memory.take(generation.account, size):
            self._end = End("max_tokens")
            raise _Enough
        generation.memory += size
        self._left = CHUNK
        if generation.spoke is None:
            generation.spoke = generation.heard

    def _append_in_parts(self, text: str) -> None:
        """Append a long piece in parts that fit a frame, up to the size of a reply."""
        size = min(len(text), self._room)
        for start in range(0, size, self._size):
            part = text[start : min(start + self._size, size)]
            self._generation.log.append(type(text)(part))
        self._room -= len(text)
