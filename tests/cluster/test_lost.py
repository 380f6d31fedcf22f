"""Messages between nodes that are lost once. Nothing tells the nodes that they are."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

import wsserver
from tests.cluster.conftest import Start
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.redis import RedisServer
from tests.support.talk import ID, ONE, exchange, opened, resume
from wsserver.cluster.peers import Peers

pytestmark = pytest.mark.slow


@dataclass
class Losses:
    """The kinds of messages that are lost from now on, and the messages that were lost."""

    kinds: tuple[str, ...] = ()
    lost: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    found, receive = Losses(), Peers.receive

    def lose(self: Peers, topic: str, sender: str, messages: list[bytes]) -> None:
        bodies = [(message, json.loads(message)) for message in messages]
        found.lost += [body for _, body in bodies if body.get("k") in found.kinds]
        receive(self, topic, sender, [m for m, body in bodies if body.get("k") not in found.kinds])

    monkeypatch.setattr(Peers, "receive", lose)
    return found


async def test_reply_of_a_deleted_conversation_ends_although_its_end_is_lost(
    losses: Losses, nodes: list[wsserver.Server], puppet: Puppet
) -> None:
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await a.prompt("Count", conversation=ONE, id=ID)
        (await puppet.reply(1)).say("1, ")
        await resume_when_saved(b)
        await b.next("token", id=ID)
        losses.kinds = "run", "deleted"
        await a.send({"type": "delete", "conversation": ONE})
        await a.next("deleted")
        await until(lambda: len(losses.lost) >= 3)
        losses.kinds = ()
        _, done = await b.text(ID)
        assert (done["type"], done["by"]) == ("done", "deleted")
        assert (await resume(b))["code"] == "forgotten"


@pytest.mark.parametrize("silent", [False, True])
async def test_reply_without_readers_is_stopped_although_the_news_is_lost(
    losses: Losses, start: Start, puppet: Puppet, *, silent: bool
) -> None:
    nodes = [await start(grace=0.2, lease=2) for _ in range(2)]
    losses.kinds = ("unfollow",)
    async with client(nodes[0]) as a:
        await a.prompt("Count", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("1, ")
        await a.next("token")
        async with client(nodes[1]) as b:
            await opened(b)
            await b.next("token", id=ID)
    await until(lambda: losses.lost)
    losses.kinds = ()
    if not silent:
        reply.say("2, ")
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()


async def test_conversation_that_was_deleted_during_an_outage_is_gone_on_all_nodes(
    nodes: list[wsserver.Server], puppet: Puppet, redis: RedisServer
) -> None:
    async with client(nodes[0]) as a, client(nodes[1]) as b, client(nodes[2]) as c:
        await exchange(a, puppet, "Q", "A", conversation=ONE, id=ID)
        for chat in (b, c):
            await opened(chat)
            await resume(chat)
            await chat.text(ID)
        await c.send({"type": "close", "conversation": ONE})
        await c.next("closed")
        redis.kill()
        await a.send({"type": "delete", "conversation": ONE})
        await a.next("deleted")
        redis.start()
        assert (await b.next("deleted"))["conversation"] == ONE
        for chat in (b, c):
            async with asyncio.timeout(BOUND):
                while (await resume(chat))["type"] == "start":
                    await chat.text(ID)
            assert chat.frames[-1]["code"] == "forgotten"
            assert (await opened(chat))["code"] == "not_found"


async def test_reply_that_began_while_its_news_was_lost_is_followed(
    losses: Losses, nodes: list[wsserver.Server], puppet: Puppet
) -> None:
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await opened(b)
        losses.kinds = ("started",)
        await a.prompt("Count", conversation=ONE, id=ID)
        await until(lambda: losses.lost)
        reply = (await puppet.reply(1)).say("1, 2")
        cluster = nodes[0].app.cluster
        assert cluster is not None
        cluster.peers.bus.on_missed()  # node A notices that Redis has not got all of its messages
        await b.next("token", id=ID)
        reply.end()
        assert (await b.text(ID))[0] == "1, 2"


async def test_end_that_comes_after_the_deletion_keeps_no_text(
    losses: Losses, nodes: list[wsserver.Server], puppet: Puppet
) -> None:
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await a.prompt("Count", conversation=ONE, id=ID)
        (await puppet.reply()).say("1, ")
        await resume_when_saved(b)
        await b.next("token", id=ID)
        losses.kinds = ("run",)  # the mirror asks for its end after the deletion
        await a.send({"type": "delete", "conversation": ONE})
        await a.next("deleted")
        await until(lambda: losses.lost)
        losses.kinds = ()
        assert (await b.text(ID))[1]["by"] == "deleted"
        assert (await resume(b))["code"] == "forgotten"


async def resume_when_saved(chat: Any) -> None:
    async with asyncio.timeout(BOUND):
        while (await resume(chat))["type"] == "error":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
