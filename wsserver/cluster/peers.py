"""Requests and answers between nodes.

A message is a JSON object with the kind ``k``. A request has a number ``n``, which its answer
repeats. Requests are not repeated: the receiver may have done what a lost answer would tell.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wsserver.cluster.bus import Bus
from wsserver.connections.session import refusal_of
from wsserver.content import compact
from wsserver.errors import Code, Refused
from wsserver.logs import log

Body = dict[str, Any]
Handler = Callable[[str, Body], Awaitable[Body]]
"""Answers a request: gets the id of the asking node and the body, and returns the answer's body."""
Listener = Callable[[str, Body], None]
"""Receives a message: gets the id of the sending node and the body."""

ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request without an answer; ``at`` is its time by the event loop's clock."""

    node: str
    at: float
    answer: "asyncio.Future[Body]"


class Gone(Exception):
    """The node that was asked is no longer in the cluster. It may have done what was asked."""


ALL = "wsserver:all"  # the topic of messages to all nodes


class Peers:
    """Sends messages to other nodes, asks them, and answers them.

    Args:
        url: the address of Redis.
        node: the id of this node.
        timeout: seconds to wait for an answer.
        on_reset: called after messages may have been lost.

    Attributes:
        bus: carries the messages.
        handlers: functions that answer requests, by kind.
        listeners: functions that receive the other messages of other nodes, by kind.
    """

    def __init__(self, url: str, node: str, timeout: float, on_reset: Callable[[], None]) -> None:
        self.bus = Bus(url, node, self.receive, self._reset)
        self.bus.on_lost = self._lost
        self.bus.on_missed = lambda: self.publish(ALL, "missed", {})
        self._on_reset = on_reset
        self.handlers: dict[str, Handler] = {}
        self.listeners: dict[str, Listener] = {}
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._open: dict[int, _Asked] = {}  # the requests without an answer
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect to Redis.

        Raises:
            ConfigError: Redis cannot be used.
        """
        await self.bus.open([ALL, topic_of(self.bus.node)])

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.bus.close()

    async def rename(self, node: str) -> None:
        """Take another id."""
        before, self.bus.node = self.bus.node, node
        self.bus.unsubscribe(topic_of(before))
        with contextlib.suppress(TimeoutError):  # it is subscribed once Redis is back
            await self.bus.subscribe(topic_of(node))

    def tell(self, node: str, kind: str, body: Mapping[str, Any]) -> None:
        """Send a message to a node."""
        self.publish(topic_of(node), kind, body)

    def publish(self, topic: str, kind: str, body: Mapping[str, Any]) -> None:
        """Send a message to all nodes that have subscribed to a topic."""
        self.bus.send(topic, compact({"k": kind, **body}).encode())

    async def ask(self, node: str, kind: str, body: Mapping[str, Any]) -> Body:
        """Ask a node, and return its answer.

        Raises:
            Refused: the node refuses, or does not answer in time.
            Gone: the node has left the cluster.
        """
        if not self.bus.healthy:
            raise Refused(Code.UNAVAILABLE)
        number, loop = next(self._numbers), asyncio.get_running_loop()
        answer = loop.create_future()
        self._open[number] = _Asked(node, loop.time(), answer)
        self.tell(node, kind, {"n": number, **body})
        try:
            async with asyncio.timeout(self._timeout):
                found: Body = await answer
                return found
        except TimeoutError:
            raise Refused(Code.UNAVAILABLE) from None
        finally:
            del self._open[number]

    def check(self, nodes: frozenset[str], since: float) -> None:
        """Give up waiting for nodes that had left the cluster at a time."""
        for asked in tuple(self._open.values()):
            if asked.at < since and asked.node not in nodes and not asked.answer.done():
                asked.answer.set_exception(Gone)

    def _lost(self) -> None:
        """Give up waiting for all answers: requests were not sent, or answers are lost."""
        for asked in tuple(self._open.values()):
            if not asked.answer.done():
                asked.answer.set_exception(Refused(Code.UNAVAILABLE))

    def _reset(self) -> None:
        self._lost()
        self._on_reset()

    def receive(self, _: str, sender: str, messages: list[bytes]) -> None:
        """Receive messages of a node from the bus; log those that this version does not know."""
        for message in messages:
            try:
                self._dispatch(sender, json.loads(message))
            except Exception as error:  # noqa: BLE001 - a node of another version, perhaps
                log.error("message of another node unusable", other=sender, failure=error)

    def _dispatch(self, sender: str, body: Body) -> None:
        kind = body.pop("k")
        if kind == ANSWER:
            self._take_answer(sender, body)
        elif kind in self.handlers:
            work = self._answer(kind, sender, body.pop("n"), body)
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind in self.listeners and sender != self.bus.node:
            self.listeners[kind](sender, body)

    def _take_answer(self, sender: str, body: Body) -> None:
        asked = self._open.get(body["n"])
        if asked is None or asked.node != sender or asked.answer.done():
            return
        answer = asked.answer
        if (refusal := body.get("refused")) is None:
            answer.set_result(body["ok"])
        else:
            refused = Refused(
                refusal["code"],
                refusal["message"],
                retryable=refusal["retryable"],
                retry_after=refusal["retry_after"],
            )
            refused.about = refusal["about"]
            answer.set_exception(refused)

    async def _answer(self, kind: str, sender: str, number: int, body: Body) -> None:
        try:
            answer = {"ok": await self.handlers[kind](sender, body)}
        except Exception as error:  # noqa: BLE001
            refused, failure = refusal_of(error)
            if failure is not None:
                log.error("request of another node failed", kind=kind, failure=failure)
            answer = {
                "refused": {
                    "code": refused.code,
                    "message": refused.message,
                    "about": refused.about,
                    "retryable": refused.retryable,
                    "retry_after": refused.retry_after,
                }
            }
        self.tell(sender, ANSWER, {"n": number, **answer})


def topic_of(node: str) -> str:
    """Return the topic of the messages to a node."""
    return f"wsserver:node:{node}"


def topic_about(owner: str, conversation: str) -> str:
    """Return the topic of what happens in a conversation. It does not tell the owner's name."""
    name = hashlib.sha256(f"{owner}\n{conversation}".encode()).hexdigest()[:32]
    return f"wsserver:conversation:{name}"
