"""Storms of reconnects and of stopped prompts leave nothing behind."""

import asyncio
import json
import secrets
from collections import Counter

import pytest

import wsserver
from tests.abuse.limits import (
    GROWTH,
    KEPT,
    Listener,
    each,
    flat,
)
from tests.support.abuse import (
    Peer,
    Served,
    frame,
    meanwhile,
    served,
)
from tests.support.client import Client, client
from tests.support.puppet import BOUND, until
from tests.support.upstream import Hang, Upstream, reply
from wsserver.prices import NOTHING

pytestmark = pytest.mark.slow


async def test_reconnect_storm_is_served_or_gets_retry_after() -> None:
    clients = [
        (f"127.0.1.{1 + n % 3 // 2}", f"storm-{n:04}-{secrets.token_hex(4)}") for n in range(360)
    ]
    statuses: Counter[int] = Counter()

    async def enter(peer: Peer) -> bool:
        answer = await peer.upgrade()
        status = int(answer.split()[1])
        statuses[status] += 1
        assert status == 101 or b"\r\nRetry-After: 10\r\n" in answer, answer
        return status == 101

    async def cut_off(server: Served, source: str, name: str) -> None:
        async with Peer.open(server, source) as peer:
            if await enter(peer):
                peer.write(frame(json.dumps({"prompt": "talk 5", "id": name})))

    async def come_back(
        server: Served, source: str, name: str, all_here: asyncio.Barrier | None
    ) -> bool:
        async with Peer.open(server, source) as peer:
            welcome = await enter(peer)
            if all_here is not None:
                async with asyncio.timeout(BOUND):
                    await all_here.wait()
            if not welcome:
                return False
            peer.write(frame(json.dumps({"type": "resume", "id": name})))
            async for message in peer.texts():
                if message.get("code") == "not_found":  # the connection was cut before the prompt
                    peer.write(frame(json.dumps({"prompt": "talk 5", "id": name})))
                elif message["type"] == "done":
                    assert message["reason"] == "end_turn"
                    return True
                else:
                    assert message["type"] in {"start", "token"}, message
            raise AssertionError("the connection ended")

    async def abuse(server: Served) -> None:
        for _ in range(3):
            await asyncio.gather(*(cut_off(server, *one) for one in clients))
        await server.reaches(connections_open=1)
        statuses.clear()
        all_here = asyncio.Barrier(len(clients))
        back = await asyncio.gather(*(come_back(server, *one, all_here) for one in clients))
        assert statuses == {101: 199, 429: statuses[429], 503: statuses[503]}
        assert statuses[429]
        assert statuses[503]
        for one, done in zip(clients, back, strict=True):
            assert done or await come_back(server, *one, None)

    limits = ("--connections", "200", "--connections-per-address", "100")
    async with served(*limits) as server, flat(server, 2 * GROWTH):
        await meanwhile(server, abuse(server))


async def stop_at_once(chat: Client, count: int) -> None:
    """Start a number of replies, and stop each at its start."""
    for _ in range(count):
        name = secrets.token_hex(8)
        await chat.send({"prompt": "hang", "id": name})
        await chat.send({"type": "stop", "id": name})
        done = await chat.next("done", "error")
        assert (done["id"], done.get("reason"), done.get("by")) == (name, "stopped", "client")


async def test_prompts_stopped_at_once_leave_no_upstream_request() -> None:
    async def abuse(server: Served) -> None:
        async with server.client() as chat:
            await stop_at_once(chat, 50)

    async with Listener() as upstream:
        upstream.default = reply("Hello ", Hang())
        environment = {"ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": "sk-key"}
        model = "anthropic:claude-sonnet-4-6"
        async with served(model=model, **environment) as server:
            await meanwhile(server, each(6, abuse, server))
            await server.reaches(generations_running=0, connections_open=0)
            await until(lambda: upstream.open == 0)
            await until(lambda: len(upstream.connections) <= KEPT)
            assert len(upstream.requests) > 10
            settings = wsserver.Settings(tokens_per_day=10_000_000, generations_per_principal=10)
        await stopped_within(upstream, settings)


async def stopped_within(upstream: Upstream, settings: wsserver.Settings) -> None:
    """Do the same in this process, and check the reserved tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTHROPIC_BASE_URL", upstream.url)
        patch.setenv("ANTHROPIC_API_KEY", "sk-key")
        given = settings.model_dump() | {"port": 0, "model": "anthropic:claude-sonnet-4-6"}
        given |= {"drain_timeout": 0, "store": "memory:"}
        tasks = asyncio.all_tasks()
        async with wsserver.serve(**given) as server:
            hub = server.app.hub
            async with client(server) as chat:
                await stop_at_once(chat, 100)
            await until(lambda: not server.app.connections)
            assert hub.live == hub.tasks == len(hub.accounts) == 0
            assert hub.accounts.reserved("anonymous") == NOTHING
        await until(lambda: upstream.open == 0)
        await until(lambda: len(asyncio.all_tasks() - tasks) == 0)
