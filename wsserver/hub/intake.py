"""Appends the pieces of a model to the log: checks, splits and counts them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

from wsserver.content import Block, Thinking, Usage, dump_block, parse_block
from wsserver.errors import Code, ModelError
from wsserver.generation import End, State
from wsserver.hub.live import Generation
from wsserver.limits import Memory, memory_size
from wsserver.models.base import Output
from wsserver.pieces import TEXT, Kind, Piece, pieces_of
from wsserver.protocol import StoppedBy
from wsserver.settings import ESCAPED, Settings
from wsserver.text import tokens_in, well_formed

CHUNK = 8192  # bytes of memory that a log acquires at once, so that few pieces acquire any
PIECES_PER_TURN = 16  # of a model that never waits, before the event loop serves others

Stop = Callable[[Generation, StoppedBy], None]

# The kinds of pieces that a model may yield -> the kind of the block that they belong to.
_FAMILIES: dict[Kind, Kind] = {
    "text": "text",
    "citation": "text",
    "thinking": "thinking",
    "signature": "thinking",
}
_END_TURN = End()
_RUNNING = State.RUNNING  # looked up once: a look-up in an enumeration takes 0.07 µs, and a token 4


class _Enough(Exception):
    """The reply has ended. The model's other pieces are dropped."""


class Intake:
    """Appends the output of a model to the log of one generation.

    Args:
        generation: the generation.
        settings: the sizes of a reply and of its frames.
        memory: counts the bytes of the log.
        time: the event loop's clock.
        stop: stops a generation without readers, when its unread tokens are over the limit.
    """

    def __init__(
        self,
        generation: Generation,
        settings: Settings,
        memory: Memory,
        time: Callable[[], float],
        stop: Stop,
    ) -> None:
        self._generation = generation
        self._room = settings.reply_size  # characters that the reply may still have
        self._size = settings.frame_size  # most characters of a piece
        self._memory = memory
        self._left = 0  # bytes of memory that are acquired and not used
        self._unread_limit = settings.grace_tokens
        self._time = time
        self._stop = stop
        self._half = ""  # a high surrogate that the next piece may complete
        self._family: Kind | None = None  # the kind of the open block
        self._block = -1  # the index of the open block, or of the last one
        self._given: int | None = None  # the model's own number of the open block
        self._end = _END_TURN  # the end of the reply, unless the model yields another one

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

    async def pull(self, pieces: AsyncIterator[Output]) -> None:
        """Iterate over a model, take its output, and close it."""
        if not hasattr(pieces, "__aiter__"):
            raise _mistake(
                f"returned {type(pieces).__name__}; write an async generator: `async def` with "
                "`yield`"
            )
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

    def take(self, given: Output) -> None:
        """Take one output of the model: append content to the log, note usage and end.

        Raises:
            _Enough: the reply has ended.
            ModelError: a model must not yield a value of this type.
            ValueError: a block is not one of the Messages API.
        """
        generation = self._generation
        if isinstance(given, Usage):  # counts after a stop too
            generation.usage = given
        elif generation.state is not _RUNNING:  # the model kept the cancellation to itself
            raise _Enough
        elif isinstance(given, str):
            generation.last_output = self._time()
            if self._family == TEXT and given.isascii() and given and not self._half:
                self._append(TEXT, given)
            elif given:
                self._add(TEXT, given)
        elif isinstance(given, End):
            self._end = given
        else:
            generation.last_output = self._time()
            self._add_content(given)

    def _add_content(self, given: Block | Piece) -> None:
        if isinstance(given, Thinking):
            self._add("thinking", given.thinking)
            if given.signature:
                self._add("signature", given.signature)
                self._close()
        elif isinstance(given, Piece):
            if given.kind not in _FAMILIES:
                raise _mistake(f"yielded a piece of kind {given.kind!r}")
            data = _citation(given.data) if given.kind == "citation" else given.data
            self._add(given.kind, data, given.block)
        elif isinstance(given, Block):
            self._close()
            written = well_formed(json.dumps(dump_block(given), ensure_ascii=False))
            for kind, data in pieces_of(parse_block(json.loads(written))):
                self._add(kind, data)
            self._close()
        else:
            raise _mistake(
                f"yielded {type(given).__name__}; yield str, Thinking, another block, Usage or End"
            )

    def _add(self, kind: Kind, data: str, given: int | None = None) -> None:
        """Add data to the open block. If the data belongs to another block, begin a new one.

        Args:
            kind: the kind of the data.
            data: the data. Empty data adds nothing, but may end the open block.
            given: the number of the block, if the model passed one. The log numbers only blocks
                with data.
        """
        family = _FAMILIES.get(kind, kind)
        if family != self._family or (given is not None and given != self._given):
            self._close()
            self._given = given
        if not data:
            return
        if self._family is None:
            self._block += 1
            self._family = family
            generation = self._generation
            generation.note_block(generation.last_output, thinks=family == "thinking")
        if kind != family or kind == "block":
            self._flush()
            self._append(kind, well_formed(data))
        else:
            text = data if data.isascii() and not self._half else self._joined(data)
            if text:
                self._append(kind, text)

    def _close(self) -> None:
        """End the open block."""
        self._flush()
        self._family = None

    def _joined(self, text: str) -> str:
        """Join text with the half of a surrogate pair from the piece before.

        A half at the end is kept for the next piece. A half without its other half becomes U+FFFD.
        """
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            self._half = text[-1]
            text = text[:-1]
        return well_formed(text)

    def _flush(self) -> None:
        """Append the last half of a surrogate pair as U+FFFD: no other half came."""
        half, self._half = self._half, ""
        if half and self._family and self._generation.state is State.RUNNING:
            self._generation.log.append(well_formed(half), self._family, self._block)

    def _append(self, kind: Kind, data: str) -> None:
        generation, size = self._generation, len(data)
        self._left -= memory_size(data)
        if self._left < 0:
            self._acquire_memory()
        if size <= self._size and size < self._room:
            generation.log.append(data, kind, self._block)
            self._room -= size
        else:
            self._append_in_parts(kind, data)
        if generation.unread is not None:
            generation.unread += tokens_in(data)
            aware = generation.last_output >= generation.unaware_until
            if aware and generation.unread > self._unread_limit:
                self._stop(generation, "disconnect")
        if self._room <= 0:
            self._end = End("max_tokens")
            raise _Enough

    def _acquire_memory(self) -> None:
        """Acquire memory for this piece and the next ones. The first piece always calls this.

        Raises:
            _Enough: there is no memory. The reply ends with the reason ``max_tokens``.
        """
        generation, size = self._generation, CHUNK - self._left
        if not self._memory.acquire(generation.account, size):
            self._end = End("max_tokens")
            raise _Enough
        generation.memory += size
        self._left = CHUNK
        if generation.first_piece is None:
            generation.first_piece = generation.last_output

    def _append_in_parts(self, kind: Kind, data: str) -> None:
        """Append data in parts that fit into a frame.

        Text and thinking are cut at the limit of the reply. Data of another kind is appended whole,
        or the reply ends before it. A citation is not split: it may have as many bytes as the
        longest frame of text.
        """
        most = self._size
        if kind == "citation":
            most = len(data)
            if len(data.encode()) > ESCAPED * self._size:
                self._room = 0
        size = min(len(data), self._room)
        if kind in _FAMILIES.values() or size == len(data):
            for start in range(0, size, most):
                part = data[start : min(start + most, size)]
                self._generation.log.append(part, kind, self._block)
        self._room -= len(data)


def _mistake(what: str) -> ModelError:
    """Return the error for a model that breaks the interface of models."""
    error = ModelError(Code.INTERNAL)
    error.advice = f"the model {what}"
    return error


def _citation(data: str) -> str:
    r"""Return the JSON of a citation without escapes such as ``\ud83d``, half of a pair.

    Raises:
        TypeError: a citation is a JSON object.
        ValueError: the data is not JSON.
    """
    citation = json.loads(data)
    if not isinstance(citation, dict):
        raise TypeError("a citation is a JSON object")
    return well_formed(json.dumps(citation, ensure_ascii=False))
