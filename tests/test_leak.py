"""Thousands of clients leave no descriptors, threads, tasks or memory."""

import asyncio
import random
import secrets
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Opcode

import wsserver
from tests.support.abuse import MEBIBYTE, Peer, Served, frame, served, talker
from tests.support.puppet import until

pytestmark = pytest.mark.slow

CONNECTIONS, WAVE = 5000, 100
STOPS, AT_ONCE = 2000, 10
WARM_UP = 0.4  # share of all connections, after which memory has reached its normal size
GROWTH = 8 * MEBIBYTE  # bytes by which memory may then grow
# Data that the server keeps for a time is kept briefly here, so that it is no leak.
BRIEF = {"replay": "1", "conversations": "50", "grace": "0", "open_timeout": "10"}


async def nothing(peer: Peer) -> None:
    """Come and go."""


async def half_a_handshake(peer: Peer) -> None:
    peer.write(Peer.HANDSHAKE)
    peer.shut()
    await peer.rest()


async def a_page(peer: Peer) -> None:
    peer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 200 " in await peer.rest()


async def a_wrong_name(peer: Peer) -> None:
    peer.write(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert b" 421 " in await peer.rest()


async def noise(peer: Peer) -> None:
    peer.write(b"\x16\x03\x01\n" * 10)
    await peer.rest()


async def a_handshake(peer: Peer) -> None:
    assert b" 101 " in await peer.upgrade()


async def a_proper_end(peer: Peer) -> None:
    await peer.upgrade()
    peer.write(frame((1000).to_bytes(2), Opcode.CLOSE))
    assert await peer.close_code() == 1000


async def a_violation(peer: Peer) -> None:
    await peer.upgrade()
    peer.write(b"\x81\x00")  # not masked
    assert await peer.close_code() == 1002


async def a_prompt(peer: Peer) -> None:
    await peer.upgrade()
    peer.write(frame('{"prompt": "hang"}'))
    async for message in peer.texts():
        if message["type"] == "token":
            return


async def a_prompt_unheard(peer: Peer) -> None:
    await peer.upgrade()
    peer.write(frame('{"prompt": "talk 100"}') + frame('{"type": "list"}'))


WAYS = (
    nothing,
    half_a_handshake,
    a_page,
    a_wrong_name,
    noise,
    a_handshake,
    a_proper_end,
    a_violation,
    a_prompt,
    a_prompt_unheard,
)


async def come_and_go(server: Served, count: int) -> None:
    """Open and end a number of connections in each way, in waves."""

    async def one(way: int) -> None:
        async with Peer.open(server) as peer:
            await WAYS[way % len(WAYS)](peer)

    for _ in range(0, count, WAVE):
        ways = random.sample(range(WAVE), WAVE)
        await asyncio.gather(*map(one, ways))


async def stop_at_once(server: Served, count: int) -> None:
    """Start a number of replies, and stop each at its start."""

    async def one() -> None:
        async with server.client() as chat:
            for number in range(count // AT_ONCE):
                name = secrets.token_hex(8)
                prompt: dict[str, Any] = {"prompt": "hang"}
                if number % 2:
                    prompt = {"messages": [{"role": "user", "content": "hang"}]}
                await chat.send({**prompt, "id": name})
                await chat.send({"type": "stop", "id": name})
                done = await chat.next("done", "error")
                assert (done["id"], done.get("by")) == (name, "client"), done
                chat.frames.clear()

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


@pytest.mark.timeout(120)
async def test_thousands_of_clients_leave_no_descriptors_threads_or_memory(tmp_path: Path) -> None:
    settings = BRIEF | {"store": f"sqlite:///{tmp_path}/conversations.sqlite"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    async with served(*flags) as server:
        descriptors, threads = server.descriptors, server.threads
        await come_and_go(server, int(CONNECTIONS * WARM_UP))
        await stop_at_once(server, int(STOPS * WARM_UP))
        await server.reaches(connections_open=0, generations_running=0)
        memory = server.memory
        await come_and_go(server, CONNECTIONS)
        await stop_at_once(server, STOPS)
        await server.reaches(connections_open=0, generations_running=0)
        await until(lambda: server.descriptors <= descriptors)
        assert server.threads <= threads
        assert server.memory - memory < GROWTH, (server.memory - memory) / MEBIBYTE
        metrics = await server.metrics()
        assert metrics['wsserver_generations_total{outcome="stopped",why="client"}'] == STOPS * (
            1 + WARM_UP
        )


async def test_hundreds_of_clients_leave_no_tasks() -> None:
    before = asyncio.all_tasks()
    settings: dict[str, Any] = {**BRIEF, "port": 0, "store": "memory:", "drain_timeout": 0}
    async with wsserver.serve(talker, **settings) as server:
        here = Here(server)
        tasks = len(asyncio.all_tasks())
        await come_and_go(here, CONNECTIONS // 10)
        await stop_at_once(here, STOPS // 10)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        hub = server.app.hub
        assert not server.listener.connections
        assert not server.listener.lingering
        assert hub.live == hub.tasks == len(hub.accounts) == 0
        assert len(server.app.admission.addresses) == server.app.admission.connections == 0
        await until(lambda: not list(hub.retention))  # after the replay time
    await until(lambda: asyncio.all_tasks() == before)


class Here(Served):
    """A server in this process, for the same clients."""

    def __init__(self, server: wsserver.Server) -> None:
        self.url = server.url
        self.port = server.port
        self.tls = None
