"""Faults of nodes, of Redis and of PostgreSQL. The node that dies is a process of its own."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.host import Host
from tests.support.postgres import Postgres
from tests.support.process import Process, run
from tests.support.puppet import Puppet
from tests.support.redis import RedisServer
from tests.support.talk import ID, ONE, OTHER, exchange, opened, turns

pytestmark = pytest.mark.slow
LEASE = 2.0
THIRD = "conversation-three"
COUNT = "Count to a thousand"
WHOLE = ", ".join(str(number) for number in range(1, 1001))


@dataclass
class Pair:
    """A node in a process of its own, which runs a slow model, and a node in this process."""

    owner: Process
    other: wsserver.Server
    chat: Client  # of the owner
    reader: Client  # of the other


COMMAND = ("-m", "wsserver")
# A node whose clock is an hour ahead.
AHEAD = (
    "-c",
    (
        "import time; real = time.time; time.time = lambda: real() + 3600; "
        "from wsserver.cli import main; main()"
    ),
)


@asynccontextmanager
async def pair(
    url: str,
    redis: RedisServer,
    puppet: Puppet,
    rate: int = 200,
    *,
    command: tuple[str, ...] = COMMAND,
    **more: Any,
) -> AsyncIterator[Pair]:
    settings: dict[str, Any] = {"cluster": redis.url, "store": url, "lease": LEASE, **more}
    flags = [
        part
        for key, value in settings.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    arguments = (*command, "serve", "--model", "demo", "--demo-rate", str(rate), *flags)
    async with run(*arguments, "--port", "0", "--drain-timeout", "0") as owner:
        address = (await owner.line(r"websocket +(\S+)"))[1]
        host = cast("Host", SimpleNamespace(url=address))
        async with (
            wsserver.serve(puppet, port=0, drain_timeout=0, titles="off", **settings) as other,
            client(host) as chat,
            client(other) as reader,
        ):
            await exchange_on(chat)
            await opened(reader)
            yield Pair(owner, other, chat, reader)


async def exchange_on(chat: Client) -> None:
    await chat.prompt("Hi", conversation=ONE)
    await chat.next("done")


def seqs(chat: Client) -> list[int]:
    return [frame["seq"] for frame in chat.frames if frame["type"] == "token" and frame["id"] == ID]


async def counted(chat: Client, number: int) -> None:
    """Wait until a client has so many pieces of the reply."""
    while not seqs(chat) or seqs(chat)[-1] < number:
        await chat.next("token", id=ID)


async def test_readers_of_a_killed_node_are_told_within_the_lease_and_a_second(
    url: str, redis: RedisServer, puppet: Puppet
) -> None:
    async with pair(url, redis, puppet) as two:
        await two.chat.prompt(COUNT, conversation=ONE, id=ID)
        await counted(two.reader, 100)
        two.owner.signal(signal.SIGKILL)
        async with asyncio.timeout(LEASE + 1):
            text, error = await two.reader.text(ID)
        assert (error["code"], error["retryable"]) == ("interrupted", True)
        assert WHOLE.startswith(text)
        said = await turns(two.reader)
        assert said[-1][2] == "interrupted"
        assert text.startswith(said[-1][1])
        assert len(text) - len(said[-1][1]) < len(text) / 2  # saved within the save interval
        # The conversation goes on here, with a retry of the turn.
        await two.reader.prompt(COUNT, conversation=ONE, id=OTHER, retry_of=ID)
        (await puppet.reply()).say("1, 2").end()
        assert (await two.reader.text(OTHER))[0] == "1, 2"


async def test_node_that_was_stopped_beyond_its_lease_says_and_saves_nothing_more(
    url: str, redis: RedisServer, puppet: Puppet
) -> None:
    async with pair(url, redis, puppet) as two:
        await two.chat.prompt(COUNT, conversation=ONE, id=ID)
        await counted(two.reader, 100)
        two.owner.signal(signal.SIGSTOP)
        text, error = await two.reader.text(ID)
        assert error["code"] == "interrupted"
        await exchange(two.reader, puppet, "Go on", "Here", conversation=ONE)
        before = await turns(two.reader)
        two.owner.signal(signal.SIGCONT)
        _, end = await two.chat.text(ID)
        assert end["code"] == "interrupted"
        assert WHOLE.startswith(two.chat.said(ID))
        assert await turns(two.reader) == before
        await two.reader.quiet()
        assert two.reader.said(ID) == text
        # The node has joined again, as another one.
        async with asyncio.timeout(20):
            while (await two.chat.prompt("Hi", conversation=THIRD))["type"] == "error":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        await two.chat.next("done")
        assert len(await turns(two.reader, THIRD)) == 2


async def test_replies_of_a_killed_node_count_until_it_is_buried(
    url: str, redis: RedisServer, puppet: Puppet
) -> None:
    async with pair(url, redis, puppet, generations_per_principal=1) as two:
        await two.chat.prompt(COUNT, conversation=ONE, id=ID)
        await counted(two.reader, 10)
        two.owner.signal(signal.SIGKILL)
        assert (await two.reader.prompt("Hi", conversation=THIRD))["code"] == "limit"
        await two.reader.text(ID)
        await exchange(two.reader, puppet, "Hi", "Hello", conversation=THIRD)


async def test_node_whose_clock_is_an_hour_ahead_is_one_of_them(
    url: str, redis: RedisServer, puppet: Puppet
) -> None:
    async with pair(url, redis, puppet, command=AHEAD) as two:
        await two.chat.prompt(COUNT, conversation=ONE, id=ID)
        await counted(two.reader, 100)
        text, done = await two.reader.text(ID)  # takes longer than two leases
        assert (text, done["reason"]) == (WHOLE, "end_turn")
        await exchange(two.reader, puppet, "Go on", "Here", conversation=THIRD)
        for chat in (two.chat, two.reader):
            history = await opened(chat, THIRD)
            assert history["messages"][-1]["content"] == "Here"
        before, now = await opened(two.reader), time.time()
        for message in before["messages"]:
            assert abs(message["began"] - now) < 60
            assert abs(message.get("ended", now) - now) < 60


@pytest.mark.parametrize("fault", ["kill", "pause", "cut", "cuts"])
async def test_reader_on_another_node_gets_all_text_although_redis_fails(
    url: str, redis: RedisServer, puppet: Puppet, fault: str
) -> None:
    async with pair(url, redis, puppet) as two:
        await two.chat.prompt(COUNT, conversation=ONE, id=ID)
        await counted(two.reader, 100)
        if fault == "kill":
            redis.kill()
            await counted(two.chat, 300)
            redis.start()
        elif fault == "pause":
            redis.signal(signal.SIGSTOP)
            await counted(two.chat, 700)
            redis.signal(signal.SIGCONT)
        else:
            for number in range(200, 300 if fault == "cut" else 800, 100):
                await counted(two.chat, number)
                await redis.command("CLIENT", "KILL", "TYPE", "pubsub")
        text, done = await two.reader.text(ID)
        assert (text, done["reason"]) == (WHOLE, "end_turn")
        assert (await two.chat.text(ID)) == (text, done)
        assert seqs(two.reader) == sorted(set(seqs(two.reader)))


async def test_stop_without_redis_is_told_and_works_after_it(
    url: str, redis: RedisServer, puppet: Puppet
) -> None:
    async with pair(url, redis, puppet, rate=50) as two:
        await two.chat.prompt(COUNT, conversation=ONE, id=ID)
        await counted(two.reader, 10)
        redis.kill()
        await two.reader.send({"type": "stop", "id": ID, "request": "S"})
        error = await two.reader.next("error", "stopped")
        assert (error["type"], error["code"], error["retryable"]) == ("error", "unavailable", True)
        await two.chat.send({"type": "stop", "id": ID})  # the owner needs no Redis
        assert (await two.chat.text(ID))[1]["by"] == "client"
        redis.start()
        assert (await two.reader.text(ID))[1]["by"] == "client"


async def test_node_shuts_down_although_the_database_is_away(
    redis: RedisServer, puppet: Puppet
) -> None:
    database = Postgres.create()
    try:
        settings: dict[str, Any] = {"store": database.url(), "cluster": redis.url}
        async with wsserver.serve(puppet, port=0, drain_timeout=0, **settings) as node:
            cluster = node.app.cluster
            assert cluster is not None
            database.stop(signal.SIGKILL)
        assert not cluster.peers.bus.healthy  # the node has left Redis too
    finally:
        database.remove()


async def test_replies_survive_a_restart_of_the_database(
    redis: RedisServer, puppet: Puppet
) -> None:
    database = Postgres.create()
    try:
        async with pair(database.url(), redis, puppet, lease=20) as two:
            await two.chat.prompt(COUNT, conversation=ONE, id=ID)
            await counted(two.reader, 100)
            database.stop(signal.SIGKILL)
            database.start()
            text, done = await two.reader.text(ID)
            assert (text, done["reason"]) == (WHOLE, "end_turn")
            assert (await two.chat.text(ID))[0] == WHOLE
            async with asyncio.timeout(20):
                while (await opened(two.reader))["type"] == "error":  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            assert (await turns(two.reader))[-1] == ("assistant", WHOLE, None)
    finally:
        database.remove()
