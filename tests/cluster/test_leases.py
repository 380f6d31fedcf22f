"""Leases while the database fails or is slow."""

from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest

import wsserver
from tests.cluster.conftest import Start
from tests.support.client import client
from tests.support.puppet import Puppet, until
from tests.support.redis import RedisServer
from tests.support.talk import ID, ONE, exchange
from wsserver.errors import StoreError
from wsserver.stores.postgres.nodes import Key, Nodes, Others

pytestmark = pytest.mark.slow


async def test_conversation_whose_release_is_not_confirmed_is_not_decided_by_two_nodes(
    nodes: list[wsserver.Server], puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, releases = Nodes.release, 0

    async def unconfirmed(self: Nodes, keys: Iterable[Key]) -> None:
        nonlocal releases
        await release(self, keys)
        releases += 1
        if releases <= 3:
            raise StoreError("connection lost")

    monkeypatch.setattr("wsserver.cluster.leases.LINGER", 0.0)
    monkeypatch.setattr(Nodes, "release", unconfirmed)
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await until(lambda: releases)
        await b.prompt("First", conversation=ONE, id=ID)
        reply = (await puppet.reply(1)).say("half")
        await b.next("token")
        assert (await a.prompt("Second", conversation=ONE))["code"] == "busy"
        assert len(puppet.replies) == 2
        reply.end()
        await b.text(ID)
        await until(lambda: releases > 3)
        cluster = nodes[0].app.cluster
        assert cluster is not None
        await until(lambda: not len(cluster.leases))
        await exchange(a, puppet, "Third", "Yes", conversation=ONE)


async def test_lease_that_is_not_confirmed_is_released(
    nodes: list[wsserver.Server], puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = Nodes.claim

    async def unconfirmed(self: Nodes, key: Key) -> str:
        await claim(self, key)
        raise StoreError("connection lost")

    cluster, other = (node.app.cluster for node in nodes[:2])
    assert cluster is not None
    assert other is not None
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        with monkeypatch.context() as patch:
            patch.setattr(Nodes, "claim", unconfirmed)
            assert (await a.prompt("Hi", conversation=ONE))["code"] == "store"
        await until(lambda: not len(cluster.leases))
        await exchange(b, puppet, "Hi", "Hello", conversation=ONE)
        assert other.forwarded == 0


async def test_node_that_was_cut_off_for_a_moment_releases_its_conversations(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start(lease=1)
    cluster = node.app.cluster
    assert cluster is not None

    async def failing(_: Nodes) -> Others:
        raise StoreError("connection lost")

    async with client(node) as a:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        with monkeypatch.context() as patch:
            patch.setattr(Nodes, "renew", failing)
            await until(lambda: not cluster.membership.alive)
        await until(lambda: cluster.membership.alive and not len(cluster.leases))
    other = await start(lease=1)
    async with client(other) as b:
        await exchange(b, puppet, "Hi", "Hello", conversation=ONE)
    assert other.app.cluster is not None
    assert (other.app.cluster.forwarded, cluster.fenced) == (0, 0)


async def test_lease_is_renewed_while_all_requests_wait_for_a_table(
    url: str, redis: RedisServer, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew, renewed = Nodes.renew, list[Others]()

    async def noted(self: Nodes) -> Others:
        renewed.append(await renew(self))
        return renewed[-1]

    monkeypatch.setattr(Nodes, "renew", noted)
    schema = url.partition("search_path=")[2]
    settings: dict[str, Any] = {"store": url, "cluster": redis.url, "lease": 2, "drain_timeout": 0}
    async with wsserver.serve(puppet, port=0, **settings) as node, AsyncExitStack() as stack:
        chats = [await stack.enter_async_context(client(node)) for _ in range(10)]
        await chats[0].prompt("Count", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("1, ")
        await chats[0].next("token")
        line = await asyncpg.connect(url, server_settings={"search_path": schema})
        async with line.transaction():
            await line.execute("LOCK TABLE generation")
            for number, chat in enumerate(chats[1:]):  # more than there are connections
                await chat.send({"type": "resume", "id": f"an-unknown-reply-{number}"})
            reply.say("2, ")  # is to be saved
            renewed.clear()
            await until(lambda: len(renewed) >= 4)  # more than a life
        await line.close()
        reply.say("3").end()
        text, done = await chats[0].text(ID)
        assert (text, done["type"]) == ("1, 2, 3", "done")
