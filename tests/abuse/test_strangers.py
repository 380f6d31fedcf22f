"""Clients without authentication use few resources."""

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Opcode

from tests.abuse.limits import (
    FRAMES,
    NOBODY,
    PING,
    each,
    flat,
)
from tests.support.abuse import (
    HERE,
    MEBIBYTE,
    Peer,
    Served,
    frame,
    meanwhile,
    served,
)
from tests.support.puppet import BOUND
from wsserver.limits import SWEEP, Budget, Rates, Shares
from wsserver.logs import MAX_LINES, WINDOW

pytestmark = pytest.mark.slow


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"alice sha256:{hashlib.sha256(b'token').hexdigest()}\n")
    return file


BEARER: dict[str, Any] = {"additional_headers": {"Authorization": "Bearer token"}}


async def test_wrong_token_closes_connection(token_file: Path) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            guess = json.dumps({"type": "auth", "token": secrets.token_hex()})
            peer.write(frame(guess) * 3 + frame('{"type": "auth", "token": "token"}'))
            codes = [message["code"] async for message in peer.texts()]
            assert codes == ["unauthenticated"]
        async with Peer.open(server) as peer:
            answer = await peer.upgrade(b"Authorization: Bearer " + secrets.token_hex().encode())
            assert answer.startswith(b"HTTP/1.1 401 ")

    async with served("--token-file", str(token_file), bearer="token") as server, flat(server):
        await meanwhile(server, each(100, abuse, server), **BEARER)
        await server.said("connection", code=1008)
        await server.said("connection refused", why="unauthenticated")


def socket_of_another_user(server: Served) -> socket.socket:
    os.seteuid(NOBODY)  # the kernel shows the user that created the socket
    try:
        sock = socket.socket()
    finally:
        os.seteuid(0)
    sock.connect((HERE, server.port))
    return sock


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_other_user_of_machine_is_refused() -> None:
    served_ones = 'wsserver_connections_total{outcome="served"}'

    async def abuse(server: Served) -> None:
        before = (await server.metrics())[served_ones]
        async with contextlib.AsyncExitStack() as stack:
            statuses = Counter[bytes]()
            for _ in range(60):
                peer = Peer(*await asyncio.open_connection(sock=socket_of_another_user(server)))
                stack.callback(peer.drop)
                statuses[(await peer.upgrade())[9:12]] += 1
                assert b"list" not in await peer.rest()
            assert set(statuses) <= {b"403", b"429"}
            async with Peer.websocket(server):  # of the server's own user, from the same address
                pass
        for number in range(40):  # the kernel does not know the user of a closed connection
            with socket_of_another_user(server) as sock:
                if number % 2:
                    reset = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                sock.send(Peer.HANDSHAKE + b"\r\n" + frame('{"prompt": "hang"}'))
        assert (await server.metrics())[served_ones] == before + 1

    async with served("--connections-per-address", "50") as server, flat(server):
        await meanwhile(server, abuse(server))
        await server.said("connection refused", why="unauthenticated", address=HERE)


def of_strangers(server: Served, name: str) -> list[dict[str, Any]]:
    return [event for event in server.events(name) if "principal" not in event]


def left_out(server: Served, name: str) -> int:
    return sum(event.get(name, 0) for event in server.events("lines left out"))


async def test_anonymous_flood_writes_bounded_log(token_file: Path) -> None:
    async def come_and_go(server: Served) -> None:
        for _ in range(MAX_LINES):
            async with Peer.websocket(server):
                pass
            async with Peer.open(server) as peer:
                answer = await peer.upgrade(b"Origin: http://" + 200 * b"\x9b")
                assert answer.startswith(b"HTTP/1.1 403 ")

    async with served("--token-file", str(token_file), bearer="token") as server, flat(server):
        lines, began = len(server.log), time.monotonic()
        await meanwhile(server, each(10, come_and_go, server), most=15, **BEARER)
        await server.reaches(connections_open=0)
        windows = 2 + (time.monotonic() - began) // WINDOW
        for name in ("connection", "connection refused"):
            written = len(of_strangers(server, name))
            assert MAX_LINES <= written <= windows * MAX_LINES, name
            async with asyncio.timeout(2 * BOUND):
                while written + left_out(server, name.replace(" ", "_")) < 10 * MAX_LINES:
                    await server.metrics()
        assert len(server.log) - lines <= 2 * windows * MAX_LINES + 50
        assert max(map(len, server.log[lines:])) < 1500
        # A flood of anonymous clients takes no log lines of principals.
        assert any(event.get("principal") == "alice" for event in server.events("connection"))


async def test_client_without_auth_is_closed_after_auth_timeout(token_file: Path) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            codes = [message["code"] async for message in peer.texts()]
            assert codes == ["unauthenticated"]

    timeout = ("--auth-timeout", "1")
    options = ("--token-file", str(token_file), *timeout)
    async with served(*options, bearer="token") as server, flat(server):
        await meanwhile(server, each(100, abuse, server), **BEARER)


async def test_frames_before_auth_are_refused_and_flood_closes_socket(
    token_file: Path,
) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            for kind in ('"prompt": "hang"', '"type": "list"', '"type": "stop"', '"type": "ping"'):
                peer.write(frame(f"{{{kind}}}") * 100)
            texts = [message async for message in peer.texts()]
            codes = {message["code"] for message in texts if message["type"] == "error"}
            assert codes <= {"unauthenticated", "limit", "not_running"}
            assert len(texts) < 40 + 40

    options = ("--token-file", str(token_file), *FRAMES)
    async with served(*options, bearer="token") as server, flat(server):
        await meanwhile(server, each(20, abuse, server), most=15, **BEARER)
        await server.said("connection", code=1008)
        assert not [e for e in server.events("generation") if e["principal"] != "alice"]


async def test_costly_frames_before_auth_close_socket_unparsed(
    token_file: Path,
) -> None:
    costly = frame('{"messages": [' + ",".join(["{}"] * 21_000) + "]}")

    async def abuse(server: Served) -> None:
        for _ in range(10):
            async with Peer.websocket(server) as peer:
                for _ in range(10):
                    peer.write(costly * 2 + frame(PING))
                texts = [message async for message in peer.texts()]
                codes = Counter(message["code"] for message in texts if message["type"] == "error")
                assert peer.code == 1008
                assert codes["unauthenticated"] == 20

    options = ("--token-file", str(token_file), *FRAMES)
    async with served(*options, bearer="token") as server, flat(server):
        await meanwhile(server, each(10, abuse, server), most=15, **BEARER)
        await server.said("connection", code=1008)


async def test_unfinished_messages_before_auth_use_bounded_memory(
    token_file: Path,
) -> None:
    empty = frame("{", fin=False) + frame(b"", Opcode.CONT, fin=False) * 4095
    unfinished = frame("x" * 60_000)[:-1]

    async def abuse(server: Served, source: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server, source)) for _ in range(100)]
            for peer in peers:
                await peer.upgrade(b"Origin: http://localhost")
                peer.write(empty)
            assert [await peer.close_code() for peer in peers] == [1009] * len(peers)
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server, source)) for _ in range(100)]
            for peer in peers:
                await peer.upgrade(b"Origin: http://localhost")
                peer.write(unfinished)
            closed = Counter([await peer.close_code() for peer in peers])
            assert closed[1013] > 0  # at once,
            assert closed[1008] > 0  # and after `auth_timeout`

    options = ("--token-file", str(token_file), "--auth-timeout", "3", "--hosts", "chat.test")
    memory = ("--memory", str(16 * MEBIBYTE), "--history-size", "1000")
    async with served(*options, *memory, bearer="token") as server, flat(server):
        sources = (abuse(server, f"127.0.3.{number}") for number in range(1, 4))
        await meanwhile(server, asyncio.gather(*sources), **BEARER)
        await server.said("connection", code=1009)


async def test_clients_of_many_addresses_use_bounded_memory() -> None:
    async def abuse(server: Served) -> None:
        for number in range(1000):
            forwarded = f"X-Forwarded-For: 2001:db8:{number // 100:x}:{number % 100:x}::1"
            async with Peer.open(server, "127.0.0.1") as peer:
                assert b" 101 " in await peer.upgrade(forwarded.encode())
                peer.write(frame(json.dumps({"prompt": "speak"})))
                async for message in peer.texts():
                    if message["type"] == "done":
                        break

    options = (
        "--allow-anonymous",
        "--proxies",
        HERE,
        "--prompts-per-minute",
        "6000",
        "--replay",
        "0",
    )
    async with served(*options) as server, flat(server):
        await meanwhile(server, abuse(server))


def test_limits_forget_unused_keys() -> None:
    rates, shares, budget = Rates(1.0, 60), Shares(4), Budget(1000)
    for number in range(100_000):
        now = number / 1000
        rates.consume((str(number),), now)
        assert shares.acquire((str(number),))
        shares.release((str(number),))
        assert len(rates) <= SWEEP + 2 * 1000
        budget.learn(str(number), number // 1000, 1)
        assert len(budget) <= 1000
    assert not len(shares)
