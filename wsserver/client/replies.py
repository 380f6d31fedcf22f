"""Starts replies, and continues them after a reconnect.

The state of a reply decides what the client sends on a new connection: the prompt if the server has
not accepted it, otherwise a ``resume`` after the last piece that arrived.
"""

import asyncio
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wsserver.client.connection import Connection
from wsserver.client.failures import ConnectionFailed, ReplyError, parse_seconds
from wsserver.client.link import CLOCK_MARGIN, Link, Request, is_refusal
from wsserver.client.queries import SHORTEST_WAIT
from wsserver.client.reply import Reply
from wsserver.errors import Code
from wsserver.protocol import Prompt, Resume, Stop

DEFAULT_WAIT = 1.0  # seconds before a refused resume is sent again, if the server tells no time


@dataclass(eq=False, slots=True)
class _Active:
    """A reply that has not ended."""

    reply: Reply
    # The frame that asks for it; None for a reply that the client only follows.
    prompt: Prompt | None
    deadline: float  # until when a refusal is tried again, by the event loop's clock
    request: Request = field(init=False)  # sends `frame`
    timer: asyncio.TimerHandle = field(init=False)  # ends the wait for the `start`
    refusal: ReplyError | None = None  # the last error that refused the prompt or a resume
    # Whether the server has fewer pieces than the client. The text then starts over.
    behind: bool = False
    # The `gap` error of a server that has fewer pieces than the caller of `resume`.
    gap: ReplyError | None = None

    @property
    def accepted(self) -> bool:
        """Whether the server has accepted the prompt."""
        return self.prompt is None or self.reply.started

    def frame(self) -> Prompt | Resume:
        reply = self.reply
        # A stopped prompt that may have been accepted is only resumed, so that it starts nothing.
        stopped = reply.stopping and self.request.times_sent > 0
        if self.prompt is None or reply.started or stopped:
            after = 0 if self.gap else reply.first if self.behind else reply.seq
            return Resume(id=reply.id, after=after)
        return self.prompt


class Replies:
    """Starts replies, continues them on new connections, and stops them."""

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._active: dict[str, _Active] = {}  # by id, oldest first
        self._stops_sent: set[str] = set()  # ids, on this connection

    def get(self, reply_id: str) -> Reply | None:
        """Return a reply that has not ended."""
        active = self._active.get(reply_id)
        return None if active is None else active.reply

    @property
    def own(self) -> list[Reply]:
        """The replies to this client's own prompts."""
        return [active.reply for active in self._active.values() if active.prompt is not None]

    def start(self, reply: Reply, prompt: Prompt | None) -> Reply:
        """Send a prompt, or a ``resume`` if there is no prompt."""
        self._send(self._add(reply, prompt))
        self._connection.reopen()
        return reply

    def _add(self, reply: Reply, prompt: Prompt | None) -> _Active:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        active = self._active[reply.id] = _Active(reply, prompt, deadline)
        active.request = Request(active.frame, functools.partial(self._on_answer, active))
        active.timer = loop.call_at(deadline, self._on_timeout, active)
        return active

    def _send(self, active: _Active) -> None:
        if self._connection.link is not None:
            self._connection.link.send_prompt(active.request)

    def adopt(self, reply_id: str, conversation: str) -> Reply:
        """Return a reply that the server sends without a request, because of ``open``."""
        reply = Reply(reply_id, conversation, 0, self.stop)
        active = self._add(reply, None)
        active.timer.cancel()
        return reply

    def follow_again(self, conversation: str) -> None:
        """Request the running replies of a conversation that other clients asked for."""
        for active in self._active.values():
            if active.prompt is None and active.reply.conversation == conversation:
                self._send(active)

    def stop(self, reply: Reply) -> None:
        """Stop a reply, now or as soon as there is a connection."""
        active, link = self._active.get(reply.id), self._connection.link
        if active is None:
            return
        reply.stopping = True
        if active.prompt is not None and not active.request.times_sent:
            self._remove(active)
            reply.finish("stopped", "client")
        elif link is not None and not link.is_queued(active.request):
            self._send_stop(reply)
        # Else `receive` sends the stop after the `start` on this connection.

    def _send_stop(self, reply: Reply) -> None:
        link = self._connection.link
        if link is not None and reply.id not in self._stops_sent:
            self._stops_sent.add(reply.id)
            on_answer = functools.partial(self._on_stop_answer, reply, link)
            link.send(Request(lambda: Stop(id=reply.id), on_answer))

    def _on_stop_answer(self, reply: Reply, link: Link, answer: Mapping[str, Any]) -> None:
        """Stop again later, if the server cannot reach the node that runs the reply."""
        if is_refusal(answer) and answer["code"] == Code.UNAVAILABLE:
            wait = max(SHORTEST_WAIT, parse_seconds(answer.get("retry_after")) or DEFAULT_WAIT)
            asyncio.get_running_loop().call_later(wait, self._stop_again, reply, link)

    def _stop_again(self, reply: Reply, link: Link) -> None:
        # `receive` sends the stop if there is another connection.
        if link is self._connection.link and not reply.over:
            self._stops_sent.discard(reply.id)
            self._send_stop(reply)

    def _remove(self, active: _Active) -> None:
        del self._active[active.reply.id]
        active.timer.cancel()
        if self._connection.link is not None:
            self._connection.link.remove(active.request)

    def _on_timeout(self, active: _Active) -> None:
        """Fail a prompt that the server has neither accepted nor refused for good."""
        if active.reply.started:
            return
        if self._connection.link is None:  # the connection has its own deadline
            loop = asyncio.get_running_loop()
            active.timer = loop.call_later(self._patience, self._on_timeout, active)
            return
        if active.request.times_sent:
            self._send_stop(active.reply)  # the server may accept the prompt later
        silence = ConnectionFailed("the server did not answer in time", final=False)
        self._remove(active)
        active.reply.fail(active.refusal or silence)

    # The connection's `Requester`.

    def pending(self) -> bool:
        """Return whether a reply has not ended."""
        return bool(self._active)

    def send_all(self, link: Link) -> None:
        """Start or continue all replies that have not ended."""
        self._stops_sent.clear()
        for active in self._active.values():
            active.behind, active.gap = False, None  # this server may have the whole reply
            link.send_prompt(active.request)

    def fail_all(self, failure: ConnectionFailed) -> None:
        """Let all replies fail."""
        for active in tuple(self._active.values()):
            self._remove(active)
            active.reply.fail(failure)

    def receive(self, frame: Mapping[str, Any]) -> None:
        """Receive a frame of a reply. Ignore frames of other replies and of later versions."""
        active = self._active.get(frame.get("id", ""))
        if active is None:
            return
        reply = active.reply
        if active.gap is not None and _continues(frame, reply.seq):
            self._remove(active)
            reply.fail(active.gap)
            return
        if frame["type"] == "start" and active.behind:
            active.behind = False
            reply.reset()
        reply.receive(frame)
        if frame["type"] == "start" and reply.stopping:
            self._send_stop(reply)
        if reply.over:
            self._remove(active)

    # Refusals.

    def _on_answer(self, active: _Active, answer: Mapping[str, Any]) -> None:
        """Handle the answer to a prompt or a resume: fail the reply, or try again."""
        reply = active.reply
        if not is_refusal(answer) or self._active.get(reply.id) is not active:
            return
        loop, link = asyncio.get_running_loop(), self._connection.link
        error = active.refusal = ReplyError.of(answer)
        if error.code == Code.SHUTTING_DOWN:
            return  # the server closes, and the next connection sends the prompt again
        if error.code == Code.NOT_FOUND and reply.stopping and not active.accepted:
            self._remove(active)
            reply.finish("stopped", "client")
            return
        if error.code == Code.NOT_FOUND and reply.started:  # the server died and saved nothing
            self._remove(active)
            reply.fail(ReplyError(Code.INTERRUPTED, "The server lost the reply.", retryable=True))
            return
        if error.code == Code.GAP and active.gap is None and link is not None:
            # The server died and lost pieces. Another resume gets all that it has.
            if reply.seq > reply.first and not active.behind:
                active.behind = True
            else:
                active.gap = error
            link.send_prompt(active.request)
            return
        wait = error.retry_after
        if wait is None and error.retryable and active.accepted:
            wait = DEFAULT_WAIT  # the reply runs, and only the resume was refused
        if error.retryable and wait is not None and loop.time() + wait < active.deadline:
            delay = max(SHORTEST_WAIT, wait * CLOCK_MARGIN)
            loop.call_later(delay, self._send_again, active, link)
            return
        self._remove(active)
        reply.fail(error)

    def _send_again(self, active: _Active, link: Link | None) -> None:
        # `send_all` has sent the request already if there is another connection.
        if link is not None and link is self._connection.link and not active.reply.over:
            link.send_prompt(active.request)


def _continues(frame: Mapping[str, Any], seq: int) -> bool:
    """Return whether a server that had fewer than ``seq`` pieces continues the reply or ends it.

    The text of the server then does not continue the text of the caller of ``resume``.
    """
    kind = frame["type"]
    if kind == "done":
        return bool(frame["seq"] < seq)
    return kind in {"token", "thinking"} and frame["seq"] > seq
