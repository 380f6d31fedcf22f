"""Messages between nodes, over the pub/sub of Redis.

The bus delivers a message at most once, and in order while nothing fails. It may lose messages:
Redis keeps none, and drops a subscriber that reads too slowly. The users of the bus notice a loss
by themselves: a request has a time-out, and content has a `seq`. After each outage the bus calls
``on_reset``, because everything that was sent meanwhile is lost.

https://redis.io/docs/latest/develop/pubsub/
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from wsserver.cluster.address import client
from wsserver.errors import ConfigError
from wsserver.logs import log

MERGE = 0.005  # seconds: messages within this time after another one go together
LONGEST = 262_144  # bytes of one message of Redis
MOST_WAITING = 33_554_432  # bytes that wait for Redis, as its limit for a subscriber; more are lost
ECHO_EVERY = 1.0  # seconds between two messages of the bus to itself
TIMEOUT = 2.0  # seconds for an answer of Redis
LONGEST_REASON = 200  # characters of an error of Redis in a message
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts to connect again

_FAILURES = (exceptions.RedisError, OSError, TimeoutError, EOFError)


@dataclass(slots=True)
class Counts:
    """What the bus has done, for the metrics.

    Attributes:
        sent: messages that Redis has accepted.
        batches: messages of Redis that carried them.
        lost: messages that Redis did not get.
        received: messages of other nodes.
        resets: times that the subscription was lost.
        delay: seconds that the last message took through Redis back to this program.
    """

    sent: int = 0
    batches: int = 0
    lost: int = 0
    received: int = 0
    resets: int = 0
    delay: float = 0.0


class Bus:
    """Sends messages to topics, and receives the messages of subscribed topics.

    A message is bytes without a line end, such as JSON.

    Args:
        url: the address of Redis, as redis-py reads it.
        node: the id of this node; the receivers get it with each message.
        on_messages: called with the topic, the id of the sending node, and its messages. Must not
            raise.
        on_reset: called after the subscriptions were lost and made again. Must not raise.
    """

    def __init__(
        self,
        url: str,
        node: str,
        on_messages: Callable[[str, str, list[bytes]], None],
        on_reset: Callable[[], None],
    ) -> None:
        self.node = node
        self.counts = Counts()
        self._on_messages = on_messages
        self._on_reset = on_reset
        self._redis = client(url, TIMEOUT, f"wsserver-{node}")
        # The bus sends itself a message each second. It comes back if both directions work, and if
        # both use the same server: after a failover one may still have the old one.
        self._echo = f"wsserver:echo:{secrets.token_hex(8)}"
        self._echo_sent: float | None = None  # when it was sent; None if it has come back
        self._topics: set[str] = {self._echo}  # the topics that this node wants to receive
        self._asked: set[str] = set()  # the topics that Redis was told of on this connection
        # Done once Redis has confirmed the subscription of a topic.
        self._confirmed: dict[str, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self._subscribed = False
        self._reachable = True  # the last publication succeeded
        self._stale = False  # the connections for publications may be to a server of before
        self._outbox: dict[str, list[bytes]] = {}
        self._waiting = 0  # bytes in the outbox
        self._missed = False  # the other nodes have not got some messages
        self._flushes: list[asyncio.Future[None]] = []  # wait for what is in the outbox
        self._filled = asyncio.Event()
        self.on_flush: Callable[[], None] = lambda: None  # called before the bus sends; may send
        self.on_lost: Callable[[], None] = lambda: None  # called when messages were not sent
        # Called when messages are sent again after some were not; may send.
        self.on_missed: Callable[[], None] = lambda: None

    @property
    def healthy(self) -> bool:
        """Whether messages are received, and the last ones were sent."""
        return self._subscribed and self._reachable

    async def open(self, topics: Iterable[str]) -> None:
        """Connect to Redis and subscribe to topics.

        Raises:
            ConfigError: Redis cannot be used.
        """
        self._topics.update(topics)
        opened = asyncio.get_running_loop().create_future()
        self._listener = asyncio.create_task(self._listen(opened))
        self._sender = asyncio.create_task(self._send_all())
        try:
            await opened
        except Exception as error:
            await self.close()
            raise ConfigError(f"cluster: cannot use Redis: {_reason(error)}") from error

    async def close(self) -> None:
        """Send what waits, and disconnect. Idempotent."""
        if self.healthy:
            await self.flush()
        tasks = {task for task in (self._listener, self._sender) if task is not None}
        self._listener = self._sender = None
        await _cancel(tasks)
        self._subscribed = False
        with contextlib.suppress(*_FAILURES):
            await self._redis.aclose()

    # Topics.

    async def subscribe(self, topic: str) -> None:
        """Receive the messages of a topic from now on.

        Raises:
            TimeoutError: Redis does not confirm the subscription. It is made later.
        """
        self._topics.add(topic)
        self._changed.set()
        if topic not in self._confirmed:
            self._confirmed[topic] = asyncio.get_running_loop().create_future()
            self._asked.discard(topic)  # perhaps unsubscribed just now: Redis has to confirm again
        async with asyncio.timeout(TIMEOUT):
            await asyncio.shield(self._confirmed[topic])

    def unsubscribe(self, topic: str) -> None:
        """Receive the messages of a topic no longer."""
        self._topics.discard(topic)
        self._confirmed.pop(topic, None)
        self._changed.set()

    # Sending.

    def send(self, topic: str, message: bytes) -> None:
        """Send a message to a topic: at once, or with others after a few milliseconds."""
        if self._waiting >= MOST_WAITING:  # one message may be larger than the bound
            self.counts.lost += 1
            self._missed = True
            return
        self._waiting += len(message)
        self._outbox.setdefault(topic, []).append(message)
        self._filled.set()

    async def flush(self) -> None:
        """Wait until Redis has what was sent so far, or did not get it."""
        sent = asyncio.get_running_loop().create_future()
        self._flushes.append(sent)
        self._filled.set()  # messages may be on their way although the outbox is empty
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await sent

    def request_flush(self) -> None:
        """Call :attr:`on_flush`: at once, or after a few milliseconds."""
        self._filled.set()

    async def _send_all(self) -> None:
        pause = FIRST_PAUSE
        while True:
            await self._filled.wait()
            began = time.monotonic()
            self._filled.clear()
            self.on_flush()
            flushes, self._flushes = self._flushes, []
            if not self._outbox:
                _settle(flushes)
                continue
            outbox, self._outbox, self._waiting = self._outbox, {}, 0
            number = sum(map(len, outbox.values()))
            try:
                await self._publish(outbox)
                _settle(flushes)
            except Exception as error:  # noqa: BLE001 - without this task the node says nothing more
                _settle(flushes)
                self._stale = self._missed = True
                self.counts.lost += number
                if self._reachable:  # once per outage
                    _report("bus cannot send", error)
                self._reachable = False
                self.on_lost()
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if not self._reachable:
                log.warning("bus sends again")
            self._reachable, pause = True, FIRST_PAUSE
            self.counts.sent += number
            if self._missed:
                self._missed = False
                self.on_missed()
            await asyncio.sleep(max(0.0, began + MERGE - time.monotonic()))

    async def _publish(self, outbox: dict[str, list[bytes]]) -> None:
        if self._stale:
            self._stale = False
            await self._redis.connection_pool.disconnect(inuse_connections=False)
        head = self.node.encode()
        async with self._redis.pipeline(transaction=False) as pipeline:
            for topic, messages in outbox.items():
                parts, size = [head], 0
                for message in messages:
                    if size + len(message) > LONGEST and len(parts) > 1:
                        pipeline.publish(topic, b"\n".join(parts))
                        parts, size = [head], 0
                    parts.append(message)
                    size += len(message)
                pipeline.publish(topic, b"\n".join(parts))
            self.counts.batches += len(pipeline.command_stack)
            await pipeline.execute()

    # Receiving.

    async def _listen(self, opened: "asyncio.Future[None]") -> None:
        """Receive for ever; subscribe again after each failure.

        The bus reads from a connection of its own. The `PubSub` of redis-py would connect and
        subscribe again by itself, and nobody would learn that messages were lost.
        """
        pause = FIRST_PAUSE
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
                assert connection is not None
                await connection.connect()
                await self._subscribe(connection)
                if self.counts.resets:
                    log.warning("bus receives again")
                pause = FIRST_PAUSE
                if not opened.done():
                    opened.set_result(None)
                else:
                    self._on_reset()
                await self._receive(connection)
            except Exception as error:  # noqa: BLE001 - without this task the node hears nothing more
                if not opened.done():
                    opened.set_exception(error)
                    return
                if self._subscribed:  # once per outage
                    _report("bus cannot receive", error)
                    self.counts.resets += 1
                self._subscribed, self._stale = False, True
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            finally:
                if connection is not None:
                    with contextlib.suppress(*_FAILURES):
                        await connection.disconnect(nowait=True)

    async def _subscribe(self, connection: AbstractConnection) -> None:
        """Subscribe to all topics, and wait for the confirmations."""
        self._asked = set(self._topics)
        missing = set(self._asked)
        await connection.send_command("SUBSCRIBE", *missing)
        while missing:
            kind, channel, *_ = await connection.read_response(timeout=TIMEOUT)
            if kind == b"subscribe":
                missing.discard(self._confirm(channel))
        self._subscribed = True

    def _confirm(self, channel: bytes) -> str:
        topic = channel.decode()
        confirmed = self._confirmed.get(topic)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)
        return topic

    async def _receive(self, connection: AbstractConnection) -> None:
        """Receive until the connection fails."""
        self._echo_sent = None
        tasks = [
            asyncio.create_task(self._read(connection)),
            asyncio.create_task(self._keep(connection)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(tasks)
            failures = await asyncio.gather(*tasks, return_exceptions=True)
        raise next(failure for failure in failures if isinstance(failure, Exception)) from None

    async def _read(self, connection: AbstractConnection) -> None:
        echo = self._echo.encode()
        while True:
            kind, channel, *rest = await connection.read_response(timeout=math.inf)
            if kind == b"subscribe":
                self._confirm(channel)
            elif kind == b"message" and channel == echo:
                if self._echo_sent is not None:
                    self.counts.delay = time.monotonic() - self._echo_sent
                    self._echo_sent = None
            elif kind == b"message":
                sender, *messages = rest[0].split(b"\n")
                self.counts.received += len(messages)
                self._on_messages(channel.decode(), sender.decode(errors="replace"), messages)

    async def _keep(self, connection: AbstractConnection) -> None:
        """Tell Redis of changed topics, and check that messages come back.

        Raises:
            TimeoutError: they do not.
        """
        loop = asyncio.get_running_loop()
        due = loop.time() + ECHO_EVERY
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._changed.wait()
            if loop.time() >= due:
                due = loop.time() + ECHO_EVERY
                self._check_echo()
            self._changed.clear()
            new, old = self._topics - self._asked, self._asked - self._topics
            self._asked = set(self._topics)
            if new:
                await connection.send_command("SUBSCRIBE", *new)
            if old:
                await connection.send_command("UNSUBSCRIBE", *old)

    def _check_echo(self) -> None:
        """Send the bus a message, unless one is under way.

        Raises:
            TimeoutError: it takes too long.
        """
        now = time.monotonic()
        if self._echo_sent is None:
            self._echo_sent = now
            self.send(self._echo, b"{}")
        elif now - self._echo_sent > TIMEOUT:
            raise TimeoutError


def _settle(futures: Iterable["asyncio.Future[None]"]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


async def _cancel(tasks: Collection["asyncio.Task[None]"]) -> None:
    """Cancel tasks, and wait for their ends.

    redis-py sends within `asyncio.wait_for`, which may lose a cancellation before Python 3.12.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=MERGE)


def _report(event: str, error: Exception) -> None:
    known = isinstance(error, _FAILURES)
    log.error(event, reason=_reason(error) if known else None, failure=None if known else error)


def _reason(error: BaseException) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"
