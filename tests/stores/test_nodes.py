"""The nodes of a cluster and their leases, in a real PostgreSQL."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.stores.support import SECONDS, done, entry, found, header, loaded, names, whole
from tests.support.postgres import Postgres
from wsserver.errors import StoreError, StoreInUse
from wsserver.prices import Spent
from wsserver.stores.base import Fenced, day_of
from wsserver.stores.postgres.nodes import Nodes
from wsserver.stores.postgres.reservations import Reservations
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
        assert all(outcomes)
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


async def test_node_may_join_twice(url: str) -> None:
    async with cluster(url, "a", "b") as ((_, nodes), (_, others)):
        await nodes.join()
        await nodes.renew()
        assert (await others.renew()).alive == {"a"}


async def test_node_that_renews_is_not_buried(url: str) -> None:
    async with cluster(url, "a", "b", life=0.2) as ((_, alive), (b, other)):
        await is_late(alive, "b")
        await other.renew()
        assert not await alive.bury("b")
        await b.commit([whole(header())])
        assert await alive.bury("nobody")


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


async def test_node_goes_by_the_clock_of_the_database(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    async with cluster(url, "a", "b") as ((a, _), (b, nodes)):
        await a.commit([whole(header("outside", None))])
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        await nodes.renew()  # compares the clocks
        assert abs(b.now() - real()) < SECONDS
        await b.purge(b.now() - 60)
        assert await found(a, "outside") == ["Hi."]


async def test_use_of_an_owner_is_that_of_all_nodes_and_ends_with_them(url: str) -> None:
    account = ("narrow", "wide")
    async with cluster(url, "a", "b", "c", life=0.2) as ((a, alive), (b, _), _):
        own, others = Reservations(a), Reservations(b)
        for name, cost in (("one", Spent(10, 1)), ("two", Spent(5, 2))):
            async with others.lock("me", account, name) as locked:
                await locked.reserve(name, "b", cost, [3.0, 7.5])
        async with own.lock("me", ("other", "wide"), "one") as locked:
            assert locked.node == "b"
            assert locked.used.held == {"other": 0, "wide": 2}
            ((key, (left, at)),) = locked.used.prompts.items()
            assert (key, left) == ("wide", 7.5)
            assert 0 <= locked.used.now - at < SECONDS
            assert (locked.used.spent, locked.used.reserved) == (Spent(0, 0), Spent(15, 3))
        await b.commit([whole(header("one", began=time.time()))])  # its end: a cost, and no share
        async with own.lock("me", account, "one") as locked:
            assert (locked.node, locked.used.held["narrow"]) == (None, 1)
            assert locked.used.spent == await a.spent("me", day_of(time.time())) != Spent(0, 0)
            assert locked.used.reserved == Spent(5, 2)
        await is_late(alive, "b")
        await alive.bury("b")
        async with own.lock("me", account, "two") as locked:
            assert (locked.node, locked.used.held) == (None, {"narrow": 0, "wide": 0})
            assert locked.used.reserved == Spent(0, 0)


async def test_decisions_about_one_account_wait_for_each_other(url: str) -> None:
    async with cluster(url, "a", "b") as ((a, _), (b, _)):
        held = []

        async def decide(store: PostgresStore, name: str) -> None:
            async with Reservations(store).lock("me", ("key",), name) as locked:
                held.append(locked.used.held["key"])
                await asyncio.sleep(0)
                await locked.reserve(name, "a" if store is a else "b", Spent(), [1.0])

        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*(decide((a, b)[n % 2], f"reply-{n}") for n in range(20)))
        assert held == list(range(20))
        await Reservations(b).remove("me", "reply-3")
        async with Reservations(a).lock("me", ("key",), "next") as locked:
            assert locked.used.held["key"] == 19


async def test_batches_of_two_nodes_do_not_wait_for_each_other(url: str) -> None:
    async with cluster(url, "a", "b") as ((a, _), (b, _)):

        async def write(store: PostgresStore, name: str, owners: list[str]) -> None:
            for number in range(60):
                asked = [header(f"{name}-{number}", f"c-{name}", owner=each) for each in owners]
                await store.commit([entry(one, new=True) for one in asked])
                ends = [entry(one, pieces=["Hi."], terminal=done()) for one in reversed(asked)]
                later = header(f"{name}-{number}-later", f"c-{name}", owner=owners[0])
                await store.commit([*ends, entry(later, new=True)])

        people = ["ann", "bob", "cy", "dan"]
        async with asyncio.timeout(3 * SECONDS):
            await asyncio.gather(write(a, "a", people), write(b, "b", people[::-1]))
        async with a.connection() as connection:
            deadlocks = await connection.fetchval(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            )
        assert deadlocks == 0


async def test_node_that_is_paused_with_a_lock_delays_others_for_a_bounded_time(url: str) -> None:
    async with cluster(url, "a") as ((a, _),):
        paused = PostgresStore(url, 0.5, node="b")
        await paused.open()
        try:
            async with asyncio.timeout(SECONDS):
                with pytest.raises(StoreError):
                    async with Reservations(paused).lock("me", ("key",), "one") as locked:
                        async with Reservations(a).lock("me", ("key",), "two") as others:
                            assert others.used.held == {"key": 0}
                        await locked.reserve("one", "b", Spent(), [1.0])
        finally:
            await paused.close()


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
