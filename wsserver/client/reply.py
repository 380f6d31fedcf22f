"""One reply, as far as it has arrived. This module does no I/O.

The text is stored once, and each reader has a position in it. A slow reader gets larger pieces and
costs no memory.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from wsserver.client.failures import ChatError, ReplyError
from wsserver.errors import Code

__all__ = ["Done", "Reply", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a reply. ``estimated``: the server estimated them, as the model did not tell."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    estimated: bool = False

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Self:
        """Convert the ``usage`` of a frame. Unknown keys are ignored."""
        return cls(**{key: counts[key] for key in cls.__slots__ if key in counts})


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a reply that did not fail.

    Attributes:
        reason: the model's stop reason, such as ``end_turn``; or ``stopped``.
        by: who stopped the reply: ``client``, ``disconnect``, ``replaced``, ``timeout``,
            ``shutdown``, ``deleted``; None if nobody did.
        usage: tokens of the reply.
        text: the whole text.
        saved: whether the conversation has the reply.
    """

    reason: str
    by: str | None
    usage: Usage
    text: str
    saved: bool = True


class _GrowingText:
    """A text that grows at its end. ``size`` is its length in characters."""

    __slots__ = ("_buffer", "size")

    def __init__(self) -> None:
        self._buffer = io.StringIO(newline="")  # keeps line ends as they are
        self.size = 0

    def append(self, text: str) -> None:
        self._buffer.seek(self.size)
        self._buffer.write(text)
        self.size += len(text)

    def read(self, start: int) -> str:
        self._buffer.seek(start)
        return self._buffer.read()


class Reply:
    """A reply: iterate over its text, stop it, or wait for its end.

    ::

        reply = chat.prompt("Tell me a story")
        async for text in reply:
            print(text, end="")
        done = await reply.done()

    Each iteration begins at the first word. After the last word it raises the exception that
    :meth:`done` raises. Leaving an iteration does not stop the reply; :meth:`stop` does, and
    leaving the ``async with`` block of the chat does.

    After a crash the server may have less text than the client has received. ``text`` and
    ``thoughts`` then become what the server has. An iteration cannot take its text back: it yields
    nothing more, and raises at the end.

    Attributes:
        id: identifies the reply, for example for :meth:`Chat.resume`.
        conversation: id of the conversation; None for a prompt with ``messages``.
        model: the model's name; None before the start.
        queued: place in the queue when the server accepted the prompt, from 1; None if the prompt
            did not have to wait.
        started: whether the server has accepted the prompt.
        over: whether the reply has ended or failed.
        stopping: whether this client has stopped the reply.
        seq: number of the last piece that arrived.
        first: number of the piece after which the text begins; 0 unless resumed after a piece.
        usage: tokens of the reply; None before the end.
    """

    def __init__(
        self, reply_id: str, conversation: str | None, after: int, stop: Callable[["Reply"], None]
    ) -> None:
        self.id = reply_id
        self.conversation = conversation
        self.model: str | None = None
        self.queued: int | None = None
        self.started = False
        self.over = False
        self.stopping = False
        self.seq = self.first = after
        self.usage: Usage | None = None
        self._stop = stop
        self._texts = {"token": _GrowingText(), "thinking": _GrowingText()}
        self._done: Done | None = None
        self._failure: ChatError | None = None
        self._changed = asyncio.Event()

    @property
    def text(self) -> str:
        """The text so far."""
        return self._texts["token"].read(0)

    @property
    def thoughts(self) -> str:
        """The model's thinking so far."""
        return self._texts["thinking"].read(0)

    @property
    def thinking(self) -> AsyncIterator[str]:
        """Iterate over the model's thinking. The iteration ends with the reply, without raising."""
        return _Reader(self, "thinking", raises=False)

    def __aiter__(self) -> AsyncIterator[str]:
        return _Reader(self, "token", raises=True)

    async def wait_for_change(self) -> None:
        """Wait until something of the reply changes, or return at once after its end."""
        if not self.over:
            await self._changed.wait()

    async def stop(self) -> None:
        """Stop the reply, without waiting for its end. After the end this does nothing.

        Without a connection, the client sends the stop on the next one.
        """
        self.request_stop()

    def request_stop(self) -> None:
        """Do the same as :meth:`stop`, for callers that cannot await, such as signal handlers."""
        if not self.over:
            self._stop(self)

    async def done(self) -> Done:
        """Wait for the end of the reply.

        Raises:
            ReplyError: the server refused the prompt, or the reply failed.
            ConnectionFailed: the client stopped trying to connect. :meth:`Chat.resume` may still
                find the reply.
        """
        while not self.over:
            await self.wait_for_change()
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        assert self._done is not None
        return self._done

    async def accepted(self) -> None:
        """Wait until the server has accepted the prompt.

        Raises:
            ReplyError: the server refused the prompt.
            ConnectionFailed: the client stopped trying to connect before that.
        """
        while not (self.started or self.over):
            await self.wait_for_change()
        if not self.started:
            await self.done()

    # Called by the chat.

    def receive(self, frame: Mapping[str, Any]) -> None:
        """Apply a frame that has the reply's id.

        Raises:
            KeyError, TypeError, ValueError: the frame breaks the protocol.
        """
        kind = frame["type"]
        if self.over:
            return
        if kind == "start":
            self.started = True
            self.model = frame["model"]
            self.queued = frame.get("queued")
            self.conversation = frame.get("conversation")
        elif kind in self._texts:
            seq = frame["seq"]
            if type(seq) is not int:
                raise TypeError("a `seq` is not a number")
            if seq <= self.seq:
                return
            self.seq = seq
            self._texts[kind].append(frame["text"])
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

    def reset(self) -> None:
        """Drop all text, since the server sends all that it has."""
        self.seq = self.first
        self._texts = {"token": _GrowingText(), "thinking": _GrowingText()}

    def growing(self, kind: str) -> _GrowingText:
        """Return the text to which the frames of a kind are appended."""
        return self._texts[kind]

    def end(self, reason: str, by: str | None, usage: Usage, *, saved: bool = True) -> None:
        """End the reply."""
        self.usage = usage
        self._done = Done(reason, by, usage, self.text, saved)
        self.over = True
        self._wake()

    def fail(self, failure: ChatError) -> None:
        """End the reply with an exception. After the end this does nothing."""
        if not self.over:
            self._failure = failure
            self.over = True
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Reader:
    """An iterator over a text. A cancelled step can be repeated, unlike that of a generator."""

    def __init__(self, reply: Reply, kind: str, *, raises: bool) -> None:
        self._reply = reply
        self._kind = kind
        self._raises = raises
        self._text = reply.growing(kind)
        self._position = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            if not self._position:  # the text may start over as long as nothing was read
                self._text = self._reply.growing(self._kind)
            if self._text.size > self._position and not self._stale:
                break
            if self._reply.over:
                if self._raises:
                    await self._reply.done()
                    if self._stale:
                        raise ReplyError(Code.GAP, "The server lost a part of the text.")
                raise StopAsyncIteration
            await self._reply.wait_for_change()
        text = self._text.read(self._position)
        self._position += len(text)
        return text

    @property
    def _stale(self) -> bool:
        """Whether the reply started over after a part of the text was read."""
        return self._text is not self._reply.growing(self._kind)
