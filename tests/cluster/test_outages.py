"""Statements of the cluster that fail or hang for a while, each on its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import wsserver
from tests.cluster.conftest import Start
from tests.support.client import client
from tests.support.puppet import Puppet, until
from tests.support.talk import ONE, exchange
from wsserver.cluster.cluster import Cluster
from wsserver.errors import ConfigError, StoreError
from wsserver.hub.elsewhere import Use
from wsserver.stores.base import Fenced
from wsserver.stores.postgres.nodes import Key, Nodes
from wsserver.stores.postgres.reservations import Locked

pytestmark = pytest.mark.slow
FAILURES = 3


class Failing:
    """A method that raises StoreError some times, or another error, and then works."""

    def __init__(
        self, method: Callable[..., Awaitable[Any]], error: type[Exception] = StoreError
    ) -> None:
        self.calls = 0
        self._method = method
        self._error = error

    def __get__(self, owner: object, _: type) -> Callable[..., Awaitable[Any]]:
        return lambda *arguments: self._call(owner, *arguments)

    async def _call(self, *arguments: object) -> Any:
        self.calls += 1
        if self.calls <= FAILURES:
            raise self._error("no connection")
        return await self._method(*arguments)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release conversations as soon as nothing runs in them."""
    monkeypatch.setattr("wsserver.cluster.leases.LINGER", 0.0)
    monkeypatch.setattr("wsserver.cluster.leases.SWEEP", 0.01)


@pytest.mark.usefixtures("hurry")
async def test_conversation_that_could_not_be_released_is_released_later(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = await start(), await start()
    failing = Failing(Nodes.release)
    monkeypatch.setattr(Nodes, "release", failing)
    cluster = node.app.cluster
    assert cluster is not None
    async with client(node) as a, client(other) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await until(lambda: not len(cluster.leases))
        assert failing.calls == FAILURES + 1
        await exchange(b, puppet, "More?", "Yes", conversation=ONE)


@pytest.mark.usefixtures("hurry")
async def test_prompt_waits_while_its_conversation_is_released(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start()
    releasing, go_on, release = asyncio.Event(), asyncio.Event(), Nodes.release

    async def hang(self: Nodes, keys: list[Key]) -> None:
        releasing.set()
        await go_on.wait()
        await release(self, keys)

    monkeypatch.setattr(Nodes, "release", hang)
    async with client(node) as a:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await releasing.wait()
        await a.send({"prompt": "More?", "conversation": ONE})
        assert await a.quiet() == []
        go_on.set()
        assert (await a.next("start", "error"))["type"] == "start"


async def test_node_lives_on_after_renewals_that_fail(
    start: Start,
    puppet: Puppet,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = await start(lease=2.0)
    failing = Failing(Nodes.renew)
    monkeypatch.setattr(Nodes, "renew", failing)
    async with client(node) as a:
        await a.prompt("Hello?", conversation=ONE)
        reply = (await puppet.reply()).say("Hi")
        await until(lambda: failing.calls > FAILURES + 1)
        reply.end()
        assert (await a.next("done", "error"))["type"] == "done"
    cluster = node.app.cluster
    assert cluster is not None
    assert (cluster.membership.alive, cluster.fenced) == (True, 0)
    told = [record.getMessage() for record in caplog.records if "lease" in record.getMessage()]
    assert [line.partition(" node=")[0] for line in told] == [
        'lease not renewed reason="no connection"',
        "lease renewed again",
    ]


@pytest.mark.usefixtures("hurry")
async def test_bug_in_a_part_does_not_end_what_keeps_the_node_alive(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start(lease=1.0)
    cluster = node.app.cluster
    assert cluster is not None
    renewing = Failing(Nodes.bury, RuntimeError)
    releasing = Failing(Nodes.release, RuntimeError)
    monkeypatch.setattr(Nodes, "bury", renewing)
    monkeypatch.setattr(Nodes, "release", releasing)
    await Nodes(node.app.store, "dead", 0.0).join()  # type: ignore[arg-type]
    async with client(node) as a:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
    await until(lambda: renewing.calls > FAILURES and not len(cluster.leases))
    assert releasing.calls == FAILURES + 1
    assert (cluster.membership.alive, cluster.fenced) == (True, 0)


async def test_node_that_cannot_join_is_one_line_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nodes, "join", Failing(Nodes.join))
    for _ in range(FAILURES):
        with pytest.raises(ConfigError, match=r"^cluster: no connection$"):
            await start()
    await start()


@pytest.mark.parametrize("failure", [StoreError, RuntimeError])
async def test_buried_node_tries_to_join_until_the_database_works(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    monkeypatch.setattr("wsserver.cluster.cluster.REJOIN", 0.01)
    node = await start(lease=1.0)
    cluster = node.app.cluster
    assert cluster is not None
    before, renew = cluster.node, Nodes.renew

    async def refuse(self: Nodes) -> Any:
        if self.node == before:
            raise Fenced("buried")
        return await renew(self)

    joining = Failing(Nodes.join, failure)
    monkeypatch.setattr(Nodes, "join", joining)
    monkeypatch.setattr(Nodes, "renew", refuse)
    await until(lambda: cluster.fenced and cluster.membership.alive)
    assert joining.calls == FAILURES + 1
    async with client(node) as a:
        await exchange(a, puppet, "Q", "A", conversation=ONE)


async def test_prompt_runs_although_its_reservation_is_not_saved(
    nodes: list[wsserver.Server], puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(Locked.reserve)
    monkeypatch.setattr(Locked, "reserve", failing)
    async with client(nodes[0]) as a:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
    assert failing.calls == 1


async def test_prompt_whose_node_dies_before_its_answer_runs_on_another_node(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, other = [await start(lease=1.0, titles="off") for _ in range(2)]
    assert dying.app.cluster is not None
    name, renew, use = dying.app.cluster.node, Nodes.renew, Cluster.use
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hang(self: Nodes) -> Any:
        if self.node == name:
            await go_on.wait()
        return await renew(self)

    @contextlib.asynccontextmanager
    async def use_later(self: Cluster, owner: str, *rest: Any) -> AsyncIterator[Use]:
        if self.node == name:
            asked.set()
            await go_on.wait()
        async with use(self, owner, *rest) as found:
            yield found

    async with client(dying) as a, client(other) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        monkeypatch.setattr(Cluster, "use", use_later)
        monkeypatch.setattr(Nodes, "renew", hang)
        await b.send({"prompt": "More?", "conversation": ONE})
        await asked.wait()
        assert (await b.next("start", "error"))["type"] == "start"
        (await puppet.reply(1)).say("Here").end()
        await b.next("done")
        go_on.set()
    assert len(puppet.replies) == 2


@pytest.mark.usefixtures("hurry")
async def test_lease_in_doubt_is_not_released_while_it_is_claimed_again(
    start: Start, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = await start(), await start()
    cluster = node.app.cluster
    assert cluster is not None
    name, claim, release = cluster.node, Nodes.claim, Nodes.release
    calls, released = 0, asyncio.Event()

    async def release_later(self: Nodes, keys: list[Key]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StoreError("no connection")
        await release(self, keys)
        released.set()

    async def claim_slowly(self: Nodes, key: Key) -> str:
        holder = await claim(self, key)
        if self.node == name:
            with contextlib.suppress(TimeoutError):  # the answer comes after many sweeps
                await asyncio.wait_for(released.wait(), 0.2)
        return holder

    monkeypatch.setattr(Nodes, "release", release_later)
    async with client(node) as a, client(other) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        monkeypatch.setattr("wsserver.cluster.leases.SWEEP", 0.05)
        monkeypatch.setattr(Nodes, "claim", claim_slowly)
        await until(lambda: calls == 1)
        assert (await a.prompt("More?", conversation=ONE))["type"] == "start"
        assert (await b.prompt("Me?", conversation=ONE))["code"] == "busy"
    assert len(puppet.replies) == 2
