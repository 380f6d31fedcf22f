"""Messages on the bus that no node has sent."""

import asyncio
import json
import random
from typing import Any

import pytest
from redis.asyncio import Redis

import wsserver
from tests.support.client import client
from tests.support.puppet import Puppet, until
from tests.support.redis import RedisServer
from tests.support.talk import ID, ONE, exchange, opened
from wsserver.cluster.peers import ALL, topic_of

pytestmark = pytest.mark.slow
KINDS = [
    "prompt",
    "stop",
    "live",
    "delete",
    "answer",
    "follow",
    "run",
    "ack",
    "unfollow",
    "started",
    "renamed",
    "deleted",
    "resuming",
    "leaving",
    "left",
    "unknown",
]
VALUES: list[Any] = [None, "", -1, 2**80, 0.5, "x", ID, ONE, [], [[]], {}, {"a": 1}]
KEYS = [
    "n",
    "h",
    "a",
    "r",
    "e",
    "s",
    "owner",
    "id",
    "after",
    "conversation",
    "account",
    "prompt",
    "model",
    "queued",
    "seq",
    "title",
    "ok",
    "refused",
    "lost",
    "grace",
]


def messages(dice: random.Random) -> list[bytes]:
    """Return messages that are wrong in many ways."""
    found = [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"k"',
        b"\xff\xfe",
        b"{}",
        b'{"k": []}',
        b"[" * 100_000,
    ]
    for kind in KINDS:
        found.append(json.dumps({"k": kind}).encode())
        for _ in range(60):
            body = {key: dice.choice(VALUES) for key in KEYS if dice.random() < 0.7}
            found.append(json.dumps({"k": kind, **body}).encode())
    numbers: list[Any] = ["x", -5, 2**70, 1.5, None, [], True]
    for after in numbers:
        for name in (ID, "unknown"):
            body = {"k": "follow", "h": 1, "owner": "anonymous", "id": name, "after": after}
            found.append(json.dumps(body).encode())
    return found


async def test_unusable_messages_change_nothing(
    nodes: list[wsserver.Server], puppet: Puppet, redis: RedisServer
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    async with client(nodes[0]) as a, client(nodes[1]) as b, Redis.from_url(redis.url) as line:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await opened(b)
        await a.prompt("Count", conversation=ONE, id=ID)
        reply = (await puppet.reply(1)).say("1, ", "2, ")
        await b.next("token", id=ID, seq=2)
        clusters = [node.app.cluster for node in nodes if node.app.cluster is not None]
        for message in messages(random.Random(seed)):
            for sender in (b"nobody", b"\xff\xfe", clusters[2].node.encode()):
                for topic in (ALL, *(topic_of(cluster.node) for cluster in clusters[:2])):
                    await line.publish(topic, sender + b"\n" + message)
        reply.say("3")
        await b.next("token", id=ID)
        reply.end()
        for chat in (a, b):
            text, done = await chat.text(ID)
            assert (text, done["reason"]) == ("1, 2, 3", "end_turn")
        await until(lambda: all(cluster.peers.bus.healthy for cluster in clusters))
        await exchange(b, puppet, "Again", "Yes", conversation=ONE)
        assert [cluster.peers.bus.counts.resets for cluster in clusters] == [0, 0, 0]
    assert unhandled == []
