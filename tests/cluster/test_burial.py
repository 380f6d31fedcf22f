"""A node that could not renew in time is buried by the others, and joins again."""

import asyncio
from typing import Any

import pytest

from tests.cluster.conftest import Start
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.talk import ID, ONE, OTHER, TWO, exchange, opened, turns
from wsserver.errors import StoreError
from wsserver.stores.postgres.nodes import Key, Nodes

pytestmark = pytest.mark.slow


async def test_buried_node_ends_its_replies_and_joins_again(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, other = [await start(lease=1.0, titles="off") for _ in range(2)]
    cluster = late.app.cluster
    assert cluster is not None
    name, renew, bury, go_on = cluster.node, Nodes.renew, Nodes.bury, asyncio.Event()
    buried = asyncio.Event()
    refused: list[str] = []

    async def hang(self: Nodes) -> Any:
        if self.node == name:
            await go_on.wait()
        return await renew(self)

    async def fail_once(self: Nodes, node: str) -> bool:
        if not refused:
            refused.append(node)
            raise StoreError("no connection")
        done = await bury(self, node)
        buried.set()
        return done

    monkeypatch.setattr(Nodes, "bury", fail_once)
    async with client(late) as a, client(other) as b:
        await a.prompt("First", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("half")
        await opened(b)
        await b.next("token", id=ID)
        await a.prompt("Second", conversation=ONE, id=OTHER, on_busy="queue")
        monkeypatch.setattr(Nodes, "renew", hang)
        for chat in (a, b):
            text, error = await chat.text(ID)
            assert (text, error["code"]) == ("half", "interrupted")
        assert reply.closed.is_set()
        assert len(puppet.replies) == 1  # the waiting prompt did not run
        assert (await a.prompt("Now?", conversation=TWO))["code"] == "unavailable"
        async with asyncio.timeout(BOUND):  # until the late node has released it, or is buried
            while (await b.prompt("Go on", conversation=ONE))["type"] == "error":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        (await puppet.reply(1)).say("Here").end()
        await b.next("done")
        async with asyncio.timeout(BOUND):
            await buried.wait()
        go_on.set()
        await until(lambda: cluster.node != name and cluster.membership.alive)
        assert (cluster.fenced, refused) == (1, [name])
        async with asyncio.timeout(BOUND):
            await exchange(a, puppet, "Again", "Yes", conversation=ONE)
        assert (await turns(b))[-1] == ("assistant", "Yes", None)


async def test_lease_that_is_confirmed_after_the_burial_is_not_used(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, other = [await start(lease=1.0, titles="off") for _ in range(2)]
    cluster = late.app.cluster
    assert cluster is not None
    name = cluster.node
    claimed, go_on, buried, rejoin = (asyncio.Event() for _ in range(4))
    claim, renew, join = Nodes.claim, Nodes.renew, Nodes.join

    async def claim_slowly(self: Nodes, key: Key) -> str:
        holder = await claim(self, key)
        if self.node == name:
            claimed.set()
            await go_on.wait()
        return holder

    async def hang(self: Nodes) -> Any:
        if self.node == name:
            await buried.wait()
        return await renew(self)

    async def join_later(self: Nodes) -> None:
        await rejoin.wait()
        await join(self)

    monkeypatch.setattr(Nodes, "claim", claim_slowly)
    monkeypatch.setattr(Nodes, "renew", hang)
    monkeypatch.setattr(Nodes, "join", join_later)
    async with client(late) as a, client(other) as b:
        asking = asyncio.create_task(a.prompt("First", conversation=ONE))
        await claimed.wait()
        async with asyncio.timeout(BOUND):  # until the other node has buried this one
            while (await b.prompt("Go on", conversation=ONE, id=ID))["type"] == "error":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        buried.set()
        await until(lambda: cluster.fenced)
        go_on.set()
        assert (await asking)["code"] == "unavailable"
        rejoin.set()
        await until(lambda: cluster.node != name and cluster.membership.alive)
        assert (await a.prompt("Now?", conversation=ONE))["code"] == "busy"
        assert len(puppet.replies) == 1
