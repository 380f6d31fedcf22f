"""One reply, as the client has it so far. It does no I/O.

Its text is kept once, as one growing text of which each reader has read so much: a reader that is
slow gets larger pieces, and costs nothing.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from wsserver.client.failures import ChatError, ReplyError

__all__ = ["Done", "Reply", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens spent on a reply. ``estimated``: the server guessed, as the model never told."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    estimated: bool = False

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Self:
        """Make one of a frame's, without the keys that are not known here."""
        return cls(**{key: counts[key] for key in cls.__slots__ if key in counts})


@dataclass(frozen=True, slots=True)
class Done:
    """How a reply ended.

    Attributes:
        reason: the model's own, as ``end_turn``; or ``stopped``.
        by: who stopped it: ``client``, ``disconnect``, ``replaced``, ``timeout``, ``shutdown``.
        usage: tokens spent.
        text: the whole.
        saved: whether the conversation has it.
    """

    reason: str
    by: str | None
    usage: Usage
    text: str
    saved: bool = True


class _Said:
    """A text that grows at its end."""

    __slots__ = ("_buffer", "size")

    def __init__(self) -> None:
        self._buffer = io.StringIO(newline="")  # which changes no line ends
        self.size = 0

    def add(self, text: str) -> None:
        self._buffer.seek(self.size)
        self._buffer.write(text)
        self.size += len(text)

    def read(self, at: int) -> str:
        self._buffer.seek(at)
        return self._buffer.read()


class Reply:
    """A reply: iterate over its text, stop it, or wait for its end.

    ::

        reply = chat.prompt("Tell me a story")
        async for text in reply:
            print(text, end="")
        done = await reply.done()

    Each iteration begins at the first word, whenever it is made, and raises what :meth:`done`
    does after the last. To leave one does not stop the reply: :meth:`stop` does, and so does
    leaving the ``async with`` of the chat.

    Attributes:
        id: names it; :meth:`Chat.resume` follows it again by this.
        conversation: which it belongs to; None where the prompt brought ``messages``.
        model: who answers; None before it has started.
        queued: its place where it had to wait behind others; None if it had not.
        started: whether the server has accepted the prompt.
        over: whether it has ended, well or not.
        seq: the number of its last piece here.
        usage: tokens spent; None before its end.
    """

    def __init__(
        self, name: str, conversation: str | None, after: int, stop: Callable[["Reply"], None]
    ) -> None:
        self.id = name
        self.conversation = conversation
        self.model: str | None = None
        self.queued: int | None = None
        self.started = False
        self.over = False
        self.stopping = False
        self.seq = after
        self.usage: Usage | None = None
        self._stop = stop
        self._text = _Said()
        self._thoughts = _Said()
        self._done: Done | None = None
        self._failure: ChatError | None = None
        self._changed = asyncio.Event()

    @property
    def text(self) -> str:
        """All text so far."""
        return self._text.read(0)

    @property
    def thoughts(self) -> str:
        """All of the model's thinking so far."""
        return self._thoughts.read(0)

    @property
    def thinking(self) -> AsyncIterator[str]:
        """Iterate over the model's thinking. It ends as the reply does, and raises nothing."""
        return _Pieces(self, self._thoughts, fails=False)

    def __aiter__(self) -> AsyncIterator[str]:
        return _Pieces(self, self._text, fails=True)

    async def stop(self) -> None:
        """Stop it; its terminal follows. Wait for nothing; after its end it does nothing.

        Without a connection the stop is sent with the next one.
        """
        self.request_stop()

    def request_stop(self) -> None:
        """Do what :meth:`stop` does, from where nothing can be awaited, as in a signal handler."""
        if not self.over:
            self._stop(self)

    async def done(self) -> Done:
        """Wait for its end.

        Raises:
            ReplyError: it was refused, or failed.
            ConnectionFailed: the connection was given up. :meth:`Chat.resume` may still find it.
        """
        while not self.over:
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        assert self._done is not None
        return self._done

    async def accepted(self) -> None:
        """Wait until the server has accepted the prompt.

        Raises:
            ReplyError: it was refused.
            ConnectionFailed: the connection was given up before.
        """
        while not (self.started or self.over):
            await self._changed.wait()
        if not self.started:
            await self.done()

    # What the chat does with it.

    def take(self, frame: Mapping[str, Any]) -> None:
        """Go on by a frame of the server's that has its id."""
        kind = frame["type"]
        if self.over:
            return
        if kind == "start":
            self.started = True
            self.model = frame["model"]
            self.queued = frame.get("queued")
            self.conversation = frame.get("conversation")
        elif kind in {"token", "thinking"}:
            seq = frame["seq"]
            if type(seq) is not int:
                raise TypeError("a piece has a number")
            if seq <= self.seq:
                return
            self.seq = seq
            (self._text if kind == "token" else self._thoughts).add(frame["text"])
        elif kind == "done":
            self.end(
                frame["reason"],
                frame.get("by"),
                Usage.of(frame["usage"]),
                saved=frame.get("saved", True),
            )
        elif kind == "error":
            if "usage" in frame:
                self.usage = Usage.of(frame["usage"])
            self.fail(ReplyError.of(frame))
        self._wake()

    def end(self, reason: str, by: str | None, usage: Usage, *, saved: bool = True) -> None:
        """It is over."""
        self.usage = usage
        self._done = Done(reason, by, usage, self.text, saved)
        self.over = True
        self._wake()

    def fail(self, failure: ChatError) -> None:
        """It is over, and not well."""
        if not self.over:
            self._failure = failure
            self.over = True
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Pieces:
    """One reader's way through a text."""

    def __init__(self, reply: Reply, said: _Said, *, fails: bool) -> None:
        self._reply = reply
        self._said = said
        self._fails = fails
        self._at = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        reply = self._reply
        while self._said.size == self._at:
            if reply.over:
                if self._fails:
                    await reply.done()
                raise StopAsyncIteration
            await reply._changed.wait()  # noqa: SLF001
        text = self._said.read(self._at)
        self._at += len(text)
        return text
