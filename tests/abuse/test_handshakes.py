"""Many, slow, huge or malformed handshakes and requests affect only their client."""

import asyncio
import contextlib
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.abuse.limits import (
    AT_THE_DOOR,
    GROWTH,
    KEPT,
    KEY,
    PING,
    each,
    flat,
)
from tests.support.abuse import (
    HERE,
    MEBIBYTE,
    MODEL,
    ROOT,
    Peer,
    Served,
    certificate,
    exchange,
    frame,
    meanwhile,
    served,
)
from tests.support.process import run
from tests.support.upstream import Upstream, reply
from wsserver.logs import MAX_LINES

pytestmark = pytest.mark.slow


async def test_slow_handshakes_time_out_and_count_for_connection_limits() -> None:
    async def nothing(peer: Peer) -> bytes:
        return await peer.rest()

    async def a_byte_at_a_time(peer: Peer) -> bytes:
        with contextlib.suppress(ConnectionError):
            for byte in Peer.HANDSHAKE * 10:
                peer.write(bytes([byte]))
                await peer.writer.drain()
                await asyncio.sleep(0.02)  # the attack is slow on purpose
        return await peer.rest()

    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server)) for _ in range(150)]
            slow = [
                asyncio.ensure_future((nothing if number % 2 else a_byte_at_a_time)(peer))
                for number, peer in enumerate(peers)
            ]
            async with Peer.open(server) as one_too_many:
                answer = await one_too_many.rest()
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nRetry-After: 10\r\n" in answer
            elsewhere = [
                await stack.enter_async_context(Peer.open(server, "127.0.0.4")) for _ in range(49)
            ]
            async with Peer.open(server, "127.0.0.5") as one_too_many:
                answer = await one_too_many.upgrade()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert (await server.get("/healthz"))[0] == 200
            assert b"\r\nRetry-After: 10\r\n" in answer
            assert set(await asyncio.gather(*slow)) == {b""}
            assert {await peer.rest() for peer in elsewhere} == {b""}

    limits = ("--connections-per-address", "150", "--connections", "200", "--open-timeout", "2")
    async with served(*limits) as server, flat(server):
        await meanwhile(server, abuse(server))
        await server.said("connection refused", why="limit", address=HERE)
        await exchange(server)


async def test_tls_handshakes_time_out_and_count_for_connection_limits(tmp_path: Path) -> None:
    file = await certificate(tmp_path)

    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server)) for _ in range(600)]
            assert server.descriptors < before + 50 + AT_THE_DOOR
            async with Peer.open(server, tls=server.tls) as one_too_many:
                answer = await one_too_many.upgrade()
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nRetry-After: 10\r\n" in answer
            assert {await peer.rest() for peer in peers} == {b""}

    limits = ("--connections-per-address", "50", "--open-timeout", "4", "--cert", str(file))
    async with served(*limits) as server, flat(server, 2 * GROWTH):
        before = server.descriptors
        await meanwhile(server, abuse(server))
        await server.said("connection refused", why="limit", address=HERE)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_idle_connections_leave_descriptors_for_replies(loop: str) -> None:
    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(400):
                source = f"127.0.1.{number % 8 + 1}"
                peer = await stack.enter_async_context(Peer.open(server, source))
                if number % 2:
                    peer.write(Peer.HANDSHAKE + b"\r\n")
            assert (await server.get("/healthz"))[0] == 200
            assert server.descriptors < 256 - 40  # replies need the rest

    options = ("--event-loop", loop, "--connections-per-address", "100")
    model = "anthropic:claude-sonnet-4-6"
    async with Upstream() as upstream:
        upstream.default = reply("fine")
        environment = {"ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": KEY}
        async with served(*options, model=model, descriptors="256", **environment) as server:
            async with flat(server, kept=KEPT):
                lines = len(server.log)
                await meanwhile(server, abuse(server))
            # Without the lines about replies of the normal client.
            others = [line for line in server.log[lines:] if '"event": "generation"' not in line]
            assert len(others) <= 2 * MAX_LINES + 20
            assert all('"level": "info"' in line for line in others)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_server_out_of_memory_exits_with_one_line(loop: str) -> None:
    command = ("-m", "wsserver", "serve", "--port", "0", "--store", "memory:", "--model", MODEL)
    limits = ("--event-loop", loop, "--grace", "60", "--grace-tokens", "1000000")
    # Coverage takes memory for each line that runs for the first time, also for the last ones.
    unmeasured = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
    async with run(*command, *limits, cwd=ROOT, **unmeasured) as process:
        server = Served(process, (await process.line(r"(ws://\S+)"))[1])
        async with server.client() as chat:
            await exchange(server, chat)
        size = server.status("VmSize") * 1024 + 8 * MEBIBYTE
        resource.prlimit(server.pid, resource.RLIMIT_AS, (size, size))
        async with contextlib.AsyncExitStack() as stack:
            # The clients read nothing, and each reply grows up to four million characters.
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                while process.process.returncode is None:
                    peer = await stack.enter_async_context(Peer.websocket(server))
                    peer.write(frame('{"prompt": "talk 250000"}'))
            assert await process.end() == 1
    words = [line for line in process.output.splitlines() if "out of memory" in line]
    assert len(words) == 1
    assert len(process.output) < 100_000


async def test_refused_connections_left_open_keep_no_descriptors() -> None:
    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(1000):
                await stack.enter_async_context(Peer.open(server))
            assert server.descriptors < before + 10 + AT_THE_DOOR

    async with served("--connections-per-address", "10") as server, flat(server):
        before = server.descriptors
        await meanwhile(server, abuse(server))


async def test_half_closed_connections_are_closed() -> None:
    async def before_the_handshake(peer: Peer) -> None:
        peer.shut()

    async def within_it(peer: Peer) -> None:
        peer.write(Peer.HANDSHAKE)
        peer.shut()

    async def with_its_end(peer: Peer) -> None:
        peer.write(Peer.HANDSHAKE + b"\r\n")
        peer.shut()

    async def after_it(peer: Peer) -> None:
        await peer.upgrade()
        peer.shut()

    async def within_a_frame(peer: Peer) -> None:
        await peer.upgrade()
        peer.write(frame(PING)[:-3])
        peer.shut()

    async def mid_stream(peer: Peer) -> None:
        await peer.upgrade()
        peer.write(frame('{"prompt": "hang"}'))
        async for message in peer.texts():
            if message["type"] == "token":
                break
        peer.shut()

    async def abuse(server: Served, how: Any) -> None:
        async with Peer.open(server) as peer:
            await how(peer)
            await peer.rest()

    async with served("--grace", "0") as server, flat(server):
        ways = (
            before_the_handshake,
            within_it,
            with_its_end,
            after_it,
            within_a_frame,
            mid_stream,
        )
        await meanwhile(server, asyncio.gather(*(each(20, abuse, server, way) for way in ways)))
        await server.said("generation", reason="stopped", by="disconnect")
        await server.said("connection", code=1006)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nCookie: " + b"x" * 100_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"Sec-WebSocket-Protocol: " + b"a," * 4000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + (b"Connection: " + b"a," * 4000 + b"\r\n") * 118, b"431"),
        (b"\x16\x03\x01\x02\x00\n" * 1000, b"400"),
    ],
    ids=["request line", "header", "many headers", "list", "lists", "noise"],
)
async def test_request_over_header_limit_is_refused(head: bytes, status: bytes) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.open(server) as peer:
            peer.write(head)
            answer = await peer.rest()
            assert answer.split(b" ")[1] == status
        async with Peer.open(server) as peer:  # and an endless request
            await peer.flood(head, 20 * MEBIBYTE // len(head))

    async with served("--open-timeout", "1") as server, flat(server):
        await meanwhile(server, each(5, abuse, server))
