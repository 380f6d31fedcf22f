"""Handshakes and WebSockets of the server: frames, memory, turns and pings."""

import asyncio
import contextlib
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

import wsserver
from tests.support.abuse import Peer, certificate, served
from tests.support.abuse import frame as masked
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.sockets import sockets_of
from tests.test_leak import Here
from wsserver.connections.connection import Connection
from wsserver.limits import account_of
from wsserver.sockets.exchange import HEADER_COST, REQUEST_COST, Exchange
from wsserver.sockets.tcp import READ_SIZE
from wsserver.sockets.websocket import BITE, FRAMES_PER_TURN, frame

PING = b'{"type":"ping"}'


@asynccontextmanager
async def peer(server: wsserver.Server) -> AsyncIterator[Peer]:
    async with Peer.websocket(Here(server), "127.0.0.1") as bare:
        yield bare


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 100_000])
def test_text_message_is_framed_as_by_library(size: int) -> None:
    text = b"x" * size
    assert frame(text) == Frame(Opcode.TEXT, text).serialize(mask=False)


async def test_open_socket_has_no_task(server: wsserver.Server) -> None:
    before = asyncio.all_tasks()
    async with peer(server) as one, peer(server) as other:
        for each in (one, other):
            each.write(masked(PING.decode()))
            assert await each.frame() == (Opcode.TEXT, b'{"type":"pong"}')
        assert asyncio.all_tasks() == before
        assert not server.listener.answering


async def test_fragmented_message_with_ping_between_is_joined(
    server: wsserver.Server,
) -> None:
    async with peer(server) as one:
        one.write(masked(PING[:4], Opcode.TEXT, fin=False))
        one.write(masked(b"", Opcode.CONT, fin=False) + masked(b"here?", Opcode.PING))
        one.write(masked(PING[4:], Opcode.CONT) + masked(PING.decode()))
        assert await one.frame() == (Opcode.PONG, b"here?")
        for _ in range(2):
            assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')


# Data before the handshake response.


@asynccontextmanager
async def handshaking(
    puppet: Puppet, **given: Any
) -> AsyncIterator[tuple[wsserver.Server, Peer, asyncio.Event]]:
    """A client whose handshake is answered after the event is set."""
    known = asyncio.Event()

    async def slow(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
        await known.wait()
        return wsserver.Principal("ada") if token == "good" else None

    async with (
        wsserver.serve(puppet, authenticate=slow, port=0, **given) as server,
        Peer.open(Here(server), "127.0.0.1") as one,
    ):
        yield server, one, known


TOKEN = b"Authorization: Bearer good\r\n"


@pytest.mark.parametrize("sent", [1, 3, 2000])
async def test_frames_in_handshake_packet_are_served(puppet: Puppet, sent: int) -> None:
    rates = {"frame_rate": 1e6, "frame_burst": 5000}
    async with handshaking(puppet, **rates) as (_, one, known):
        one.write(Peer.HANDSHAKE + TOKEN + b"\r\n" + masked(PING.decode()) * sent)
        known.set()
        await one.reader.readuntil(b"\r\n\r\n")
        for _ in range(sent):
            assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')


async def test_frames_before_handshake_response_are_bounded_and_kept(puppet: Puppet) -> None:
    text = json.dumps({"type": "ping", "request": "x" * 40})
    rates = {"frame_rate": 1e6, "frame_burst": 5000, "max_unsent": 2**20}
    async with handshaking(puppet, **rates) as (server, one, known):
        one.write(Peer.HANDSHAKE + TOKEN + b"\r\n")
        for _ in range(4000):
            one.write(masked(text))
        await until(lambda: bool(server.listener.connections))
        (exchange,) = server.listener.connections
        assert isinstance(exchange, Exchange)
        await until(lambda: not exchange.transport.is_reading())
        assert READ_SIZE <= server.memory.used < 2 * READ_SIZE + REQUEST_COST + 20 * HEADER_COST
        known.set()
        await one.reader.readuntil(b"\r\n\r\n")
        for _ in range(4000):
            assert (await one.frame())[0] == Opcode.TEXT


async def test_data_after_refused_handshake_is_dropped(puppet: Puppet) -> None:
    async with handshaking(puppet) as (_, one, known):
        one.write(Peer.HANDSHAKE + b"Authorization: Bearer bad\r\n\r\n" + b"x" * 50_000)
        known.set()
        answer = await one.rest()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"Bearer" in answer


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_frames_in_handshake_packet_are_served_on_every_loop(
    loop: str, tls: bool, tmp_path: Path
) -> None:
    options = ["--event-loop", loop, "--frame-rate", "10000", "--frame-burst", "10000"]
    if tls:
        options += ["--cert", str(await certificate(tmp_path))]
    async with served(*options) as server, Peer.open(server, tls=server.tls) as one:
        one.write(Peer.HANDSHAKE + b"\r\n" + masked(PING.decode()) * 2000)
        assert b" 101 " in await one.reader.readuntil(b"\r\n\r\n")
        one.write(masked(PING.decode()))
        for _ in range(2001):
            assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')


# The cost of a request head.

OFFERS = b"Sec-WebSocket-Protocol: "


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((OFFERS + b",".join([b"a"] * 64),), b"101"),
        ((OFFERS + b",".join([b"a"] * 65),), b"400"),
        ((OFFERS + b",".join([b"a"] * 33), OFFERS + b",".join([b"b"] * 40)), b"400"),
        ((b"Connection: " + b",".join([b"a"] * 4000),), b"400"),
        ((b"Upgrade: " + b",".join([b"a"] * 100),), b"400"),
        ((b"Sec-WebSocket-Extensions: a" + b";b" * 100,), b"400"),
        ((b"X-Forwarded-For: " + b",".join([b"192.0.2.1"] * 100),), b"400"),
        ((b"If-None-Match: " + b",".join([b'"a"'] * 100),), b"400"),
        ((OFFERS + b",".join([b"a"] * 4070),) * 118, b"431"),
        ((b"Cookie: " + b"x" * 8000,) * 5, b"431"),
        ((b"Cookie: " + b"x" * 8000,) * 3, b"101"),
        ((b"A: b",) * 118, b"101"),
        ((b"A: b",) * 1000, b"431"),
    ],
)
async def test_handshake_head_is_bounded(
    server: wsserver.Server,
    lines: tuple[bytes, ...],
    status: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed: list[int] = []

    def parse(self: ServerProtocol, request: Request) -> Any:
        parsed.append(sum(len(value) for _, value in request.headers.raw_items()))
        return process(self, request)

    process = ServerProtocol.process_request
    monkeypatch.setattr(ServerProtocol, "process_request", parse)
    async with Peer.open(Here(server), "127.0.0.1") as one:
        one.write(Peer.HANDSHAKE + b"".join(b"%b\r\n" % line for line in lines) + b"\r\n")
        answer = await one.reader.readuntil(b"\r\n\r\n")
        assert answer.split(b" ")[1] == status
        assert len(parsed) == (status == b"101"), "what is refused is not taken apart"
    await until(lambda: not server.listener.connections)
    assert server.memory.used == 0


async def test_unfinished_head_counts_for_memory_until_close(server: wsserver.Server) -> None:
    async with Peer.open(Here(server), "127.0.0.1") as one:
        one.write(Peer.HANDSHAKE + b"A: b\r\n" * 50)
        await until(lambda: server.memory.used > 50 * HEADER_COST)
    await until(lambda: not server.listener.connections)
    assert server.memory.used == 0


async def test_request_counts_for_memory_until_answered(
    puppet: Puppet,
) -> None:
    async with handshaking(puppet) as (server, one, known):
        one.write(Peer.HANDSHAKE + TOKEN + b"\r\n")
        await until(lambda: bool(server.listener.answering))
        one.drop()
        await until(lambda: not server.listener.connections)
        assert server.memory.used > REQUEST_COST
        known.set()
        await until(lambda: not server.listener.answering)
        assert (server.memory.used, len(server.memory)) == (0, 0)


# The memory of a connection.


def exposed(server: wsserver.Server) -> str:
    return server.metrics.exposition().decode()


LITTLE: dict[str, Any] = {"memory": 2**21, "history_size": 1000}


async def test_unfinished_message_counts_for_memory_until_delivered(
    server: wsserver.Server,
) -> None:
    memory = server.memory
    async with peer(server) as one, peer(server) as other:
        whole = masked("x" * 40_000)
        one.write(whole[:-1])
        await until(lambda: memory.used >= 40_000)
        assert f"wsserver_memory_bytes {float(memory.used)}\n" in exposed(server)
        other.write(masked("y" * 20_000, fin=False))
        await until(lambda: memory.used >= 60_000)
        assert len(memory) == 1
        one.write(whole[-1:])
        assert (await one.frame())[0] == Opcode.TEXT
        await until(lambda: memory.used < 30_000)
    await until(lambda: not server.listener.connections)
    assert (memory.used, len(memory)) == (0, 0)


def frames_in_memory() -> int:
    """Count the frame objects of the library, also those of earlier tests."""
    return sum(type(thing) is Frame for thing in gc.get_objects())


async def test_empty_fragments_keep_no_objects(server: wsserver.Server) -> None:
    before = frames_in_memory()
    async with peer(server) as one:
        one.write(masked("{", fin=False) + masked(b"", Opcode.CONT, fin=False) * 200)
        one.write(masked(b"", Opcode.PING))
        assert await one.frame() == (Opcode.PONG, b"")  # the server has parsed the fragments
        assert server.memory.used < 100
        assert frames_in_memory() < before + 20
        one.write(masked(PING[1:], Opcode.CONT))
        assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')


@pytest.mark.parametrize(
    ("size", "fragments", "ends"),
    [(0, 256, False), (0, 257, True), (1, 256, False), (1, 300, True), (64, 900, False)],
)
async def test_small_fragments_of_a_message_are_bounded(
    server: wsserver.Server, size: int, fragments: int, ends: bool
) -> None:
    async with peer(server) as one:
        part = masked(b" " * size, Opcode.CONT, fin=False)
        one.write(masked("{", fin=False) + part * (fragments - 2))
        one.write(masked(PING[1:], Opcode.CONT))
        opcode, data = await one.frame()
        if ends:
            assert (opcode, data[:2]) == (Opcode.CLOSE, (1009).to_bytes(2))
        else:
            assert (opcode, data) == (Opcode.TEXT, b'{"type":"pong"}')


async def test_client_over_memory_share_closes_with_1013_alone(
    puppet: Puppet,
) -> None:
    whole = masked("x" * 60_000)
    part, rest = whole[:-1], whole[-1:]
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **LITTLE) as server:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(peer(server)) for _ in range(20)]
            for one in peers:
                one.write(part)
            refused = [await one.close_code() for one in peers[3:]]
            assert set(refused) == {1013}
            assert server.memory.used <= server.memory.limit / 8
            async with Peer.websocket(Here(server), "127.0.0.2") as other:
                other.write(whole)
                assert (await other.frame())[0] == Opcode.TEXT
            for one in peers[:3]:  # the first clients
                one.write(rest)
                assert (await one.frame())[0] == Opcode.TEXT
        await until(lambda: not server.listener.connections)
        assert server.memory.used == 0


async def test_full_memory_refuses_requests_with_503_until_released(
    puppet: Puppet,
) -> None:
    async with wsserver.serve(puppet, port=0, **LITTLE) as server:
        acquired = []
        for number in range(2000):
            while server.memory.acquire((f"somebody {number}",), 100):
                acquired.append((f"somebody {number}",))
        async with Peer.open(Here(server), "127.0.0.1") as one:
            answer = await one.upgrade(*[b"A: b"] * 100)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: 10\r\n" in answer
        assert 'outcome="limit"} 1.0' in exposed(server)
        for account in acquired:
            server.memory.release(account, 100)
        async with peer(server) as one:
            one.write(masked(PING.decode()))
            assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')


async def test_unread_data_counts_for_memory_until_read(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0) as server,
        Peer.websocket(Here(server), "127.0.0.1", narrow=True) as one,
    ):
        one.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (socket,) = sockets_of(server)
        written = 0
        while socket.waiting < 150_000:
            socket.write(b"x" * 10_000)
            written += 1
        assert server.memory.used >= socket.waiting
        one.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(written):
            await one.frame()
        await until(lambda: server.memory.used == 0)


async def test_unread_data_aborts_client_when_memory_is_full(
    puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        wsserver.serve(puppet, port=0, **LITTLE, max_unsent=2**20) as server,
        Peer.websocket(Here(server), "127.0.0.1", narrow=True) as one,
    ):
        one.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (socket,) = sockets_of(server)
        with caplog.at_level("INFO"):
            while not socket.transport.is_closing():
                socket.write(b"x" * 10_000)
        assert "too much unsent" in caplog.text
        await until(lambda: not server.listener.connections)
        assert server.memory.used == 0


async def test_memory_is_released_to_account_at_acquire(puppet: Puppet) -> None:
    async def named(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
        return None if token is None else wsserver.Principal(token)

    async with (
        wsserver.serve(puppet, authenticate=named, port=0) as server,
        Peer.open(Here(server), "127.0.0.1") as one,
    ):
        assert b" 101 " in await one.upgrade(b"Origin: http://localhost")
        memory = server.memory
        auth = masked('{"type": "auth", "token": "ada"}')
        whole = masked("x" * 30_000)
        one.write(auth + whole[:-1])
        await until(lambda: memory.used > 30_000)
        assert (await one.frame())[0] == Opcode.TEXT
        one.write(whole[-1:])
        assert (await one.frame())[0] == Opcode.TEXT
        await until(lambda: memory.used == 0)
        one.write(whole[:-1])
        await until(lambda: memory.used > 30_000)
        assert memory.used_by(account_of("ada")) == memory.used
    await until(lambda: memory.used == 0)
    assert len(memory) == 0


async def test_messages_after_violation_are_ignored(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str | bytes] = []
    monkeypatch.setattr(Connection, "receive", lambda self, message: heard.append(message))
    async with wsserver.serve(puppet, port=0) as server, peer(server) as one:
        one.write(masked("before") + masked(b"\xff", Opcode.TEXT) + masked("after"))
        assert await one.close_code() == 1007
    assert heard == ["before"]


async def test_exception_in_receive_closes_socket_and_is_logged_once(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def receive(self: Connection, message: str) -> None:
        heard.append(message)
        raise LookupError("a bug of ours")

    monkeypatch.setattr(Connection, "receive", receive)
    async with wsserver.serve(puppet, port=0) as server, peer(server) as one:
        one.write(masked("x") * 50)
        assert await one.close_code() == 1011
    assert heard == ["x"]


async def test_client_sending_constantly_is_read_in_turns(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = 0
    heard: list[str] = []
    turns: Counter[int] = Counter()

    def receive(self: Connection, message: str) -> None:
        heard.append(message)
        turns[turn] += 1

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Connection, "receive", receive)
    sent = [str(number) for number in range(5000)]
    async with wsserver.serve(puppet, port=0) as server, peer(server) as one:
        counting = asyncio.create_task(count())
        one.write(b"".join(masked(text) for text in sent))
        await until(lambda: len(heard) == len(sent))
        counting.cancel()
    assert heard == sent
    assert max(turns.values()) <= FRAMES_PER_TURN + BITE // len(masked("0"))


async def test_unread_input_of_aborted_client_is_dropped(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def receive(self: Connection, message: str) -> None:
        heard.append(message)
        if len(heard) == 1:
            asyncio.get_running_loop().call_soon(socket.abort)  # before the next turn

    monkeypatch.setattr(Connection, "receive", receive)
    async with wsserver.serve(puppet, port=0) as server, peer(server) as one:
        (socket,) = sockets_of(server)
        one.write(masked("x") * 1000)
        await until(lambda: not server.listener.connections)
        for _ in range(10):
            await asyncio.sleep(0)
    assert 1 <= len(heard) <= BITE // len(masked("x"))


async def test_data_received_with_eof_is_handled(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(Connection, "receive", lambda self, message: heard.append(message))
    sent = [str(number) for number in range(500)]
    data = b"".join(masked(text) for text in sent)
    async with wsserver.serve(puppet, port=0) as server, peer(server):
        (socket,) = sockets_of(server)
        socket.get_buffer(-1)[: len(data)] = data
        socket.buffer_updated(len(data))
        assert len(heard) < len(sent)
        socket.eof_received()
        assert heard == sent


async def test_exception_in_receive_closes_only_its_socket(
    server: wsserver.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def receive(self: Connection, message: str) -> None:
        raise ZeroDivisionError

    async with client(server) as other:
        await other.quiet()
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "receive", receive)
            async with peer(server) as one:
                one.write(masked("x"))
                assert await one.close_code() == 1011
        await other.quiet()
    assert "connection failed" in caplog.text


# Keep-alive pings.


async def pings(bare: Peer, count: int) -> list[bytes]:
    """Answer a number of pings; return their data."""
    found = []
    for _ in range(count):
        opcode, data = await bare.frame()
        assert opcode == Opcode.PING
        bare.write(masked(data, Opcode.PONG))
        found.append(data)
    return found


async def test_client_answering_pings_stays_connected(puppet: Puppet) -> None:
    times: dict[str, Any] = {"ping_interval": 0.02, "ping_timeout": 30}
    async with wsserver.serve(puppet, port=0, **times) as server, peer(server) as one:
        assert len(set(await pings(one, 4))) == 4
        one.write(masked(PING.decode()))
        assert (Opcode.TEXT, b'{"type":"pong"}') in [await one.frame() for _ in range(2)]


@pytest.mark.parametrize(
    "answer",
    [b"", masked(b"other", Opcode.PONG), masked(PING.decode())],
    ids=["nothing", "another pong", "a frame"],
)
@pytest.mark.parametrize("within", [0.05, 0.01])
async def test_client_without_pong_is_closed_with_1011(
    puppet: Puppet, answer: bytes, within: float
) -> None:
    times: dict[str, Any] = {"ping_interval": 0.02, "ping_timeout": within}
    async with wsserver.serve(puppet, port=0, **times) as server, peer(server) as one:
        (opcode, _) = await one.frame()
        assert opcode == Opcode.PING
        one.write(answer)
        while opcode != Opcode.CLOSE:
            opcode, data = await one.frame()
            assert opcode in {Opcode.CLOSE, Opcode.TEXT}, "it pings no more"
        assert data == (1011).to_bytes(2) + b"keepalive ping timeout"


async def test_client_not_reading_is_not_pinged(puppet: Puppet) -> None:
    times: dict[str, Any] = {"ping_interval": 0.01, "ping_timeout": 30, "drain_timeout": 0}
    async with wsserver.serve(puppet, port=0, **times) as server, peer(server) as one:
        (socket,) = sockets_of(server)
        await pings(one, 1)
        socket.pause_writing()
        async with peer(server) as other:
            await pings(other, 5)  # for five intervals
        one.write(masked(PING.decode()))
        assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')
        socket.resume_writing()
        await pings(one, 1)


async def test_client_ignoring_close_frame_is_aborted(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, send_timeout=0.05) as server, peer(server) as one:
        (socket,) = sockets_of(server)
        socket.end(1000, "enough")
        socket.end(1001, "which is too late")
        socket.write(b"and so is this")
        assert await one.frame() == (Opcode.CLOSE, (1000).to_bytes(2) + b"enough")
        await asyncio.wait_for(socket.wait_closed(), BOUND)
        assert socket.ended_with == 1000
        assert not server.app.connections
