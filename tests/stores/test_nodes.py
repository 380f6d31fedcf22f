"""The nodes of a cluster and their leases, in a real PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.stores.support import SECONDS, done, entry, found, header, loaded, names, whole
from tests.support.postgres import Postgres
from wsserver.errors import StoreInUse
from wsserver.stores.base import Fenced
from wsserver.stores.postgres.nodes import Nodes
from wsserver.stores.postgres.store import PostgresStore

pytestmark = pytest.mark.slow
KEY = ("me", "c")


@asynccontextmanager
async def cluster(
    url: str, *ids: str, life: float = 60
) -> AsyncIterator[list[tuple[PostgresStore, Nodes]]]:
    async with AsyncExitStack() as stack:
        members = []
        for id_ in ids:
            store = PostgresStore(url, node=id_)
            await store.open()
            stack.push_async_callback(store.close)
            nodes = Nodes(store, id_, life)
            await nodes.join()
            members.append((store, nodes))
        yield members


async def is_late(nodes: Nodes, other: str) -> None:
    async with asyncio.timeout(SECONDS):
        while other not in (await nodes.renew()).late:
            pass


async def test_nodes_share_tables_that_a_single_server_cannot_use(url: str) -> None:
    async with cluster(url, "a", "b") as ((a, _), (b, _)):
        await a.commit([whole(header())])
        assert await found(b) == ["Hi."]
        with pytest.raises(StoreInUse):
            await PostgresStore(url).open()
    alone = PostgresStore(url)
    await alone.open()
    with pytest.raises(StoreInUse):
        await PostgresStore(url, node="c").open()
    await alone.close()


async def test_one_of_many_nodes_gets_a_conversation(url: str) -> None:
    async with cluster(url, *"abcd") as members:
        holders = await asyncio.gather(*(nodes.claim(KEY) for _, nodes in members for _ in "123"))
        (holder,) = set(holders)
        await members["abcd".index(holder)][1].release([KEY])
        other = next(nodes for _, nodes in members if nodes.node != holder)
        assert await other.holder(KEY) is None
        assert await other.claim(KEY) == other.node
        assert await other.claim(("you", "c")) == other.node  # each owner has ids of its own
        # A node releases only what it has.
        await members["abcd".index(holder)][1].release([KEY])
        assert await other.holder(KEY) == other.node


async def test_late_node_is_buried_once_and_its_writes_are_refused(url: str) -> None:
    async with cluster(url, "a", "b", "c", life=0.2) as ((a, alive), (b, late), (_, third)):
        await third.renew()
        asked = header("running")
        await b.commit([entry(asked, True, 0, ["Half "])])
        await late.claim(KEY)
        await is_late(alive, "b")
        outcomes = await asyncio.gather(alive.bury("b"), third.bury("b"))
        assert sorted(outcomes) != [False, False]
        assert (await loaded(a)).turns[0].partial == "interrupted"
        assert await found(a, "running") == ["Half "]
        for write in (
            b.commit([entry(asked, after=1, pieces=["a word"])]),
            b.commit([entry(asked, after=1, pieces=["a word"], terminal=done())]),
            b.commit([whole(header("new", "d"))]),
            late.renew(),
            late.claim(("me", "d")),
        ):
            with pytest.raises(Fenced):
                await write
        assert await found(a, "running") == ["Half "]
        assert await names(a) == ["c"]
        assert await alive.claim(KEY) == "a"


async def test_node_that_renews_is_not_buried(url: str) -> None:
    async with cluster(url, "a", "b", life=0.2) as ((_, alive), (b, other)):
        await is_late(alive, "b")
        await other.renew()
        assert not await alive.bury("b")
        await b.commit([whole(header())])
        assert not await alive.bury("nobody")


async def test_burial_waits_for_a_write_and_no_write_follows(url: str) -> None:
    async with cluster(url, "a", "b", life=0.1) as ((a, alive), (b, _)):
        await b.commit([entry(header(), new=True)])
        await is_late(alive, "b")

        async def write() -> int:
            saved = 0
            while True:
                try:
                    await b.commit([entry(header(), after=saved, pieces=["x"])])
                except Fenced:
                    return saved
                saved += 1

        writing = asyncio.create_task(write())
        await asyncio.sleep(0)
        assert await alive.bury("b")
        saved = await asyncio.wait_for(writing, SECONDS)
        assert await found(a) == ["x"] * saved


async def test_half_done_burial_is_completed_by_another_node(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(url, "a", "b", "c", life=0.2) as ((a, first), (b, _), (c, second)):
        await b.commit([entry(header(), True, 0, ["Half"])])
        await is_late(first, "b")

        async def die(_: object) -> None:
            raise asyncio.CancelledError

        with monkeypatch.context() as patched:
            patched.setattr(a, "end_replies", die)
            with pytest.raises(asyncio.CancelledError):
                await first.bury("b")
        assert "b" in (await second.renew()).late
        assert await second.bury("b")
        assert (await loaded(c)).turns[0].partial == "interrupted"


async def test_no_node_is_late_just_after_a_start_of_the_database() -> None:
    server = Postgres.create()
    try:
        async with cluster(server.url(), "a", "b", life=0.5) as ((_, alive), (_, other)):
            await is_late(alive, "b")
            server.stop()
            server.start()
            async with asyncio.timeout(SECONDS):
                while True:
                    try:
                        others = await alive.renew()
                        break
                    except Exception:  # noqa: BLE001
                        await asyncio.sleep(0.02)
            if others.late:  # the start took longer than a life
                pytest.skip("this machine is too slow")
            await other.renew()
            assert not await alive.bury("b")
    finally:
        server.remove()
