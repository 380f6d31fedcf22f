"""The bus between nodes, over a real Redis."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.support.puppet import until
from tests.support.redis import RedisServer
from wsserver.cluster import bus as module
from wsserver.cluster.bus import Bus
from wsserver.errors import ConfigError

pytestmark = pytest.mark.slow
SECONDS = 20


class Peer:
    """A node that notes what it receives."""

    def __init__(self, name: str, url: str) -> None:
        self.got: list[tuple[str, str, bytes]] = []
        self.resets = 0
        self.changed = asyncio.Event()
        self.bus = Bus(url, name, self._receive, self._reset)

    def _receive(self, topic: str, sender: str, messages: list[bytes]) -> None:
        self.got += [(topic, sender, message) for message in messages]
        self.changed.set()

    def _reset(self) -> None:
        self.resets += 1
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def peers(redis: RedisServer, *names: str) -> AsyncIterator[list[Peer]]:
    async with AsyncExitStack() as stack:
        found = [Peer(name, redis.url) for name in names]
        for peer in found:
            await peer.bus.open([f"node {peer.bus.node}"])
            stack.push_async_callback(peer.bus.close)
        yield found


async def delivered(sender: Peer, receiver: Peer, mark: bytes) -> None:
    """Send a message again and again until it arrives: Redis may be away."""
    async with asyncio.timeout(SECONDS):
        while not any(message == mark for _, _, message in receiver.got):
            sender.bus.send(f"node {receiver.bus.node}", mark)
            receiver.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(receiver.changed.wait(), 0.1)


async def test_messages_arrive_in_order_and_go_together(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        sent = [b"%d" % number for number in range(10_000)]
        for number, message in enumerate(sent):
            a.bus.send("node b", message)
            if number % 500 == 0:
                await asyncio.sleep(0)
        await b.until(lambda: len(b.got) == len(sent))
        assert b.got == [("node b", "a", message) for message in sent]
        assert a.got == []
        await until(lambda: a.bus.counts.sent == len(sent))
        assert a.bus.counts.batches < 20


async def test_large_messages_are_split_into_bounded_batches(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        sent = [bytes([65 + n]) * 200_000 for n in range(10)]
        for message in sent:
            a.bus.send("node b", message)
        await b.until(lambda: len(b.got) == len(sent))
        assert [message for _, _, message in b.got] == sent
        assert a.bus.counts.batches == 10


async def test_messages_over_the_bound_are_lost_and_counted(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 1000)
    async with peers(redis, "a", "b") as (a, b):
        for number in range(20):
            a.bus.send("node b", b"%0100d" % number)
        await b.until(lambda: len(b.got) == 10)
        assert a.bus.counts.lost == 10
        a.bus.send("node b", b"again")
        await b.until(lambda: len(b.got) == 11)


async def test_topic_is_received_between_subscribe_and_unsubscribe(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        a.bus.send("topic", b"early")
        await until(lambda: a.bus.counts.sent)
        await b.bus.subscribe("topic")
        a.bus.send("topic", b"now")
        await b.until(lambda: b.got)
        b.bus.unsubscribe("topic")
        await b.bus.subscribe("other")  # after the end of the other subscription
        a.bus.send("topic", b"late")
        a.bus.send("other", b"last")
        await b.until(lambda: len(b.got) == 2)
        assert [message for _, _, message in b.got] == [b"now", b"last"]


async def test_topic_is_subscribed_again_at_once(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        await b.bus.subscribe("topic")
        b.bus.unsubscribe("topic")
        await b.bus.subscribe("topic")
        a.bus.send("topic", b"here")
        await b.until(lambda: b.got)


async def test_flush_waits_for_messages_that_are_on_their_way(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", SECONDS)
    async with peers(redis, "a", "b") as (a, b):
        redis.signal(signal.SIGSTOP)
        a.bus.send("node b", b"slow")
        await asyncio.sleep(0)  # the bus takes the message
        flushed = asyncio.create_task(a.bus.flush())
        await asyncio.wait({flushed}, timeout=0.1)
        assert not flushed.done()
        redis.signal(signal.SIGCONT)
        await flushed
        assert a.bus.counts.sent >= 1
        await b.until(lambda: b.got)


async def test_subscriptions_return_after_restart_of_redis(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        await b.bus.subscribe("topic")
        for outage in range(1, 4):
            redis.kill()
            redis.start()
            await b.until(lambda outage=outage: b.resets == outage)  # type: ignore[misc]
            await delivered(a, b, b"after %d" % outage)
            a.bus.send("topic", b"topic %d" % outage)
            await b.until(lambda outage=outage: ("topic", "a", b"topic %d" % outage) in b.got)  # type: ignore[misc]
            assert a.bus.healthy
            assert b.bus.healthy


async def test_silent_redis_is_noticed_and_used_again(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ECHO_EVERY", 0.05)
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    async with peers(redis, "a", "b") as (a, b):
        redis.signal(signal.SIGSTOP)
        await until(lambda: not b.bus.healthy)
        redis.signal(signal.SIGCONT)
        await b.until(lambda: b.resets)
        await delivered(a, b, b"again")


async def test_cut_subscription_is_told_each_time(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        for cut in range(1, 6):
            await redis.command("CLIENT", "KILL", "TYPE", "pubsub")
            await b.until(lambda cut=cut: b.resets == cut)  # type: ignore[misc]
            await delivered(a, b, b"%d" % cut)
        assert b.bus.counts.resets == 5


async def test_unusable_redis_is_one_line_error(redis: RedisServer) -> None:
    port = redis.port
    redis.kill()
    for url in (f"redis://127.0.0.1:{port}/0", "redis://127.0.0.1:x", "http://127.0.0.1"):
        with pytest.raises(ConfigError, match=r"^cluster: ") as raised:
            await Peer("a", url).bus.open(["node a"])
        assert "\n" not in str(raised.value)


async def test_lost_messages_are_told_once_when_sending_works_again(redis: RedisServer) -> None:
    async with peers(redis, "a", "b") as (a, b):
        a.bus.on_missed = lambda: a.bus.send("node b", b"missed")
        await delivered(a, b, b"before")
        redis.kill()
        a.bus.send("node b", b"lost")
        await until(lambda: a.bus.counts.lost)
        redis.start()
        await b.until(lambda: ("node b", "a", b"missed") in b.got)
        await delivered(a, b, b"after")
        assert [message for _, _, message in b.got].count(b"missed") == 1
