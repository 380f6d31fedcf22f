"""What a WebSocket is to the server: no task, frames of its own, pings, and its turn."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

import wsserver
from tests.support.abuse import Peer
from tests.support.abuse import frame as masked
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from tests.test_leak import Here
from wsserver.connection import Connection
from wsserver.transport import BITE, FRAMES_PER_TURN, Socket, frame

PING = b'{"type":"ping"}'


@asynccontextmanager
async def peer(server: wsserver.Server) -> AsyncIterator[Peer]:
    async with Peer.websocket(Here(server), "127.0.0.1") as bare:
        yield bare


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 100_000])
def test_a_text_message_is_framed_as_the_library_would(size: int) -> None:
    text = b"x" * size
    assert frame(text) == Frame(Opcode.TEXT, text).serialize(mask=False)


async def test_an_open_socket_has_no_task(server: wsserver.Server) -> None:
    before = asyncio.all_tasks()
    async with peer(server) as one, peer(server) as other:
        for each in (one, other):
            each.write(masked(PING.decode()))
            assert await each.frame() == (Opcode.TEXT, b'{"type":"pong"}')
        assert asyncio.all_tasks() == before
        assert not server._endpoint.answering


async def test_a_message_in_fragments_is_one_with_a_ping_in_between(
    server: wsserver.Server,
) -> None:
    async with peer(server) as one:
        one.write(masked(PING[:4], Opcode.TEXT, fin=False))
        one.write(masked(b"", Opcode.CONT, fin=False) + masked(b"here?", Opcode.PING))
        one.write(masked(PING[4:], Opcode.CONT) + masked(PING.decode()))
        assert await one.frame() == (Opcode.PONG, b"here?")
        for _ in range(2):
            assert await one.frame() == (Opcode.TEXT, b'{"type":"pong"}')


async def test_after_a_violation_nothing_is_heard_any_more(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str | bytes] = []
    monkeypatch.setattr(Connection, "receive", lambda self, message: heard.append(message))
    async with wsserver.serve(puppet, port=0) as server, peer(server) as one:
        one.write(masked("before") + masked(b"\xff", Opcode.TEXT) + masked("after"))
        assert await one.close_code() == 1007
    assert heard == ["before"]


async def test_a_fault_of_ours_ends_the_connection_and_is_told_once(
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


async def test_who_sends_without_a_pause_gets_its_turn_and_no_more(
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


async def test_what_is_unread_of_one_that_is_cut_is_dropped(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def receive(self: Connection, message: str) -> None:
        heard.append(message)
        if len(heard) == 1:
            asyncio.get_running_loop().call_soon(socket.abort)  # before the next turn

    monkeypatch.setattr(Connection, "receive", receive)
    async with wsserver.serve(puppet, port=0) as server, peer(server) as one:
        (socket,) = server._connections
        one.write(masked("x") * 1000)
        await until(lambda: not server._endpoint.connections)
        for _ in range(10):
            await asyncio.sleep(0)
    assert 1 <= len(heard) <= BITE // len(masked("x"))


async def test_all_that_came_before_the_end_is_heard_also_where_both_come_in_one_turn(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(Connection, "receive", lambda self, message: heard.append(message))
    sent = [str(number) for number in range(500)]
    data = b"".join(masked(text) for text in sent)
    async with wsserver.serve(puppet, port=0) as server, peer(server):
        (socket,) = server._connections
        socket.get_buffer(-1)[: len(data)] = data
        socket.buffer_updated(len(data))
        assert len(heard) < len(sent)
        socket.eof_received()
        assert heard == sent


async def test_what_fails_in_a_message_closes_that_socket_alone(
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


# Whether the peer is there.


async def pings(bare: Peer, count: int) -> list[bytes]:
    """Return what so many pings say, each of them answered."""
    found = []
    for _ in range(count):
        opcode, data = await bare.frame()
        assert opcode == Opcode.PING
        bare.write(masked(data, Opcode.PONG))
        found.append(data)
    return found


async def test_who_answers_pings_stays(puppet: Puppet) -> None:
    times: dict[str, Any] = {"ping_interval": 0.02, "ping_timeout": 30}
    async with wsserver.serve(puppet, port=0, **times) as server, peer(server) as one:
        (socket,) = server._connections
        assert len(set(await pings(one, 4))) == 4
        await until(lambda: socket._ping is None)
        one.write(masked(PING.decode()))
        assert (Opcode.TEXT, b'{"type":"pong"}') in [await one.frame() for _ in range(2)]


@pytest.mark.parametrize("answer", [b"", masked(b"other", Opcode.PONG), masked(PING.decode())])
@pytest.mark.parametrize("within", [0.05, 0.01])
async def test_who_answers_no_ping_is_closed_with_1011(
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


async def test_who_is_behind_is_not_pinged(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Semaphore(0)

    def look(self: Socket) -> None:
        keep_alive(self)
        looked.release()

    keep_alive = Socket._keep_alive
    monkeypatch.setattr(Socket, "_keep_alive", look)
    times: dict[str, Any] = {"ping_interval": 0.01, "ping_timeout": 30, "drain_timeout": 0}
    async with wsserver.serve(puppet, port=0, **times) as server, peer(server) as one:
        (socket,) = server._connections
        await pings(one, 1)
        await until(lambda: socket._ping is None)
        socket.pause_writing()
        async with asyncio.timeout(BOUND):
            for _ in range(5):
                await looked.acquire()
        assert socket._ping is None
        socket.resume_writing()
        await pings(one, 1)


async def test_one_that_is_told_to_go_and_stays_is_cut(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, send_timeout=0.05) as server, peer(server) as one:
        (socket,) = server._connections
        socket.end(1000, "enough")
        socket.end(1001, "which is too late")
        socket.write(b"and so is this")
        assert await one.frame() == (Opcode.CLOSE, (1000).to_bytes(2) + b"enough")
        await asyncio.wait_for(socket.wait_closed(), BOUND)
        assert socket.ended_with == 1000
        assert not server._connections
