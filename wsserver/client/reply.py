"""One reply: its content so far, and its end. This module does no I/O."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from wsserver.client.failures import ChatError, ReplyError
from wsserver.content import Block, Usage, compact
from wsserver.errors import Code
from wsserver.pieces import Kind, Pieces
from wsserver.wire import optional, parse_usage, text_of

CONTENT = frozenset({"token", "thinking", "block"})  # types of frames


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
        thought: seconds that the model thought; None without thinking.
    """

    reason: str
    by: str | None
    usage: Usage
    text: str
    saved: bool = True
    thought: float | None = None


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
    ``thoughts`` then change to the server's text. An iteration cannot take back its text: it yields
    nothing more, and raises at the end.

    Attributes:
        id: identifies the reply, for example for :meth:`Chat.resume`.
        conversation: id of the conversation; None for a prompt with ``messages``.
        prompt: text of the prompt, for a reply of a :class:`Subscription`; else None.
        retry_of: id of the reply that this one replaces, for a reply of a :class:`Subscription`.
        model: the model's name; None before the start.
        queued: place in the queue when the server accepted the prompt, from 1; None if the prompt
            did not have to wait.
        started: whether the server has accepted the prompt.
        over: whether the reply has ended or failed.
        stopping: whether this client has stopped the reply.
        seq: number of the last piece that arrived.
        first: number of the piece after which the text begins; 0 unless resumed after a piece.
        usage: tokens of the reply; None before the end.
        thought: seconds that the model thought; None before the end, and without thinking.
    """

    def __init__(
        self, reply_id: str, conversation: str | None, after: int, stop: Callable[["Reply"], None]
    ) -> None:
        self.id = reply_id
        self.conversation = conversation
        self.prompt: str | None = None
        self.retry_of: str | None = None
        self.model: str | None = None
        self.queued: int | None = None
        self.started = False
        self.over = False
        self.stopping = False
        self.seq = self.first = after
        self.usage: Usage | None = None
        self.thought: float | None = None
        self._stop = stop
        self._content = Pieces()
        self._done: Done | None = None
        self._failure: ChatError | None = None
        self._changed = asyncio.Event()

    @property
    def text(self) -> str:
        """The text so far."""
        return self._content.text

    @property
    def thoughts(self) -> str:
        """The model's thinking so far."""
        return self._content.joined("thinking")

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The content blocks so far, as in the Messages API, without unfinished tool calls."""
        return self._content.blocks(unfinished=True)

    @property
    def thinking(self) -> AsyncIterator[str]:
        """Iterate over the model's thinking. The iteration ends with the reply, without raising."""
        return _Reader(self, lambda: self._content, "thinking", raises=False)

    def __aiter__(self) -> AsyncIterator[str]:
        return _Reader(self, lambda: self._content, "text", raises=True)

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
            KeyError, TypeError, ValueError: the frame violates the protocol.
        """
        kind = frame["type"]
        if self.over:
            return
        if kind == "start":
            self.started = True
            self.model = frame["model"]
            self.queued = frame.get("queued")
            self.conversation = frame.get("conversation")
            self.prompt = frame.get("prompt", self.prompt)
            self.retry_of = frame.get("retry_of", self.retry_of)
        elif kind in CONTENT:
            seq = frame["seq"]
            if type(seq) is not int:
                raise TypeError("a `seq` is not a number")
            if seq <= self.seq:
                return
            self.seq = seq
            self._receive_content(frame)
        elif kind in {"done", "error"}:
            done = kind == "done"
            self.usage = parse_usage(frame["usage"]) if done or "usage" in frame else None
            self.thought = optional(float, frame.get("thought"))
            if done:
                self.finish(frame["reason"], frame.get("by"), saved=frame.get("saved", True))
            else:
                self.fail(ReplyError.of(frame))
        self._wake()

    def _receive_content(self, frame: Mapping[str, Any]) -> None:
        kind, block = frame["type"], frame.get("block", 0)
        if type(block) is not int:
            raise TypeError("a `block` is not a number")
        if kind == "block":
            self._content.extend("block", block, [text_of(frame["partial_json"])])
            return
        if text := text_of(frame["text"]):
            self._content.extend("text" if kind == "token" else "thinking", block, [text])
        if "citation" in frame:
            self._content.extend("citation", block, [compact(frame["citation"])])
        if "signature" in frame:
            self._content.extend("signature", block, [text_of(frame["signature"])])

    def reset(self) -> None:
        """Drop all text: the server sends the reply from its first piece."""
        self.seq = self.first
        self._content = Pieces()

    def finish(self, reason: str, by: str | None, *, saved: bool = True) -> None:
        """End the reply."""
        usage = self.usage = self.usage or Usage()
        self._done = Done(reason, by, usage, self.text, saved, self.thought)
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

    def __init__(
        self, reply: Reply, content: Callable[[], Pieces], kind: Kind, *, raises: bool
    ) -> None:
        self._reply = reply
        self._current_content = content
        self._kind = kind
        self._raises = raises
        self._content = content()
        self._position = 0  # the number of pieces that were looked at
        self._begun = False  # whether a part of the text was read

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            if self._stale and not self._begun:  # the text may start over
                self._content, self._position = self._current_content(), 0
            if not self._stale:
                text = self._content.joined(self._kind, self._position)
                self._position = len(self._content)
                if text:
                    self._begun = True
                    return text
            if self._reply.over:
                if self._raises:
                    await self._reply.done()
                    if self._stale:
                        raise ReplyError(Code.GAP, "The server lost a part of the text.")
                raise StopAsyncIteration
            await self._reply.wait_for_change()

    @property
    def _stale(self) -> bool:
        """Whether the reply has started over."""
        return self._content is not self._current_content()
