"""A slow or stuck reader affects only itself."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.sockets import sockets_of

pytestmark = pytest.mark.slow

WORD = "0123456789abcde "


class Sluggard:
    """A client on a bare socket that reads only when the test reads."""

    def __init__(self, sock: socket.socket, protocol: ClientProtocol) -> None:
        self.sock = sock
        self.protocol = protocol
        self.events: list[object] = []

    async def send(self, text: str) -> None:
        self.protocol.send_text(text.encode())
        await self.flush()

    async def ping(self, count: int) -> None:
        for _ in range(count):
            self.protocol.send_ping(b"x" * 125)
        await self.flush()

    async def flush(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(BOUND):
            for data in self.protocol.data_to_send():
                await loop.sock_sendall(self.sock, data)

    async def read(self) -> bool:
        """Read once; False at the end of the connection."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(BOUND):
            try:
                data = await loop.sock_recv(self.sock, 65536)
            except ConnectionResetError:
                return False
        if not data:
            return False
        self.protocol.receive_data(data)
        self.events += self.protocol.events_received()
        return True

    @property
    def texts(self) -> list[str]:
        return [
            bytes(event.data).decode()
            for event in self.events
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT
        ]

    async def until(self, part: str) -> list[str]:
        while not any(part in text for text in self.texts):
            assert await self.read(), "the connection ended"
        return self.texts


@asynccontextmanager
async def sluggard(server: wsserver.Server) -> AsyncIterator[Sluggard]:
    sock = socket.socket()
    sock.setblocking(False)
    # A small receive buffer is soon full.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        protocol = ClientProtocol(parse_uri(server.url))
        protocol.send_request(protocol.connect())
        slow = Sluggard(sock, protocol)
        await slow.flush()
        while not slow.events:
            assert await slow.read()
        slow.events.clear()
        yield slow
    finally:
        sock.close()


async def stuck(server: wsserver.Server, puppet: Puppet, slow: Sluggard) -> str:
    """Have the model write more than all buffers can hold; return the whole text."""
    await slow.send('{"prompt": "Talk", "id": "the-slow-one-0001"}')
    reply = await puppet.reply()
    transport = sockets_of(server)[0]
    count = 0
    while transport.writable:
        count += 100
        reply.say(*[WORD] * 100)
        await until(reply.heard_out)
    # The same amount again waits in the log.
    reply.say(*[WORD] * count)
    await until(reply.heard_out)
    return WORD * 2 * count


async def test_slow_reader_delays_neither_model_nor_other_sockets(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with sluggard(server) as slow:
        await stuck(
            server, puppet, slow
        )  # the server has all pieces, though the client reads nothing
        async with client(server) as brisk:
            start = await brisk.prompt("Quick")
            (await puppet.reply(1)).say("swift").end()
            assert (await brisk.text(start["id"]))[0] == "swift"


async def test_slow_reader_gets_merged_frames_without_loss(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with sluggard(server) as slow:
        said = await stuck(server, puppet, slow)
        puppet.replies[0].end()
        frames = [Client.parse(text) for text in await slow.until('"done"')]
    tokens = [frame for frame in frames if frame["type"] == "token"]
    assert "".join(frame["text"] for frame in tokens) == said
    assert frames[-1]["seq"] == tokens[-1]["seq"] == len(said) // len(WORD)
    sizes = [len(frame["text"]) for frame in tokens]
    assert max(sizes) > 100 * len(WORD), "what waited came in few large frames"
    assert max(sizes) <= server.settings.frame_size + len(WORD)


async def test_unsent_data_of_slow_reader_fits_write_buffer(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with sluggard(server) as slow:
        await stuck(server, puppet, slow)
        (transport,) = sockets_of(server)
        unsent = transport.transport.get_write_buffer_size()
        assert unsent <= server.settings.write_buffer + 4 * server.settings.frame_size


async def test_slow_reader_gets_done_soon_after_stop(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with sluggard(server) as slow:
        await stuck(server, puppet, slow)
        in_log = len(puppet.replies[0].said)
        await slow.send('{"type": "stop"}')
        async with asyncio.timeout(BOUND):
            await puppet.replies[0].closed.wait()  # while its buffers are still full
        frames = [Client.parse(text) for text in await slow.until('"done"')]
        assert frames[-1]["by"] == "client"
        assert frames[-1]["seq"] == in_log
        start = len(slow.texts)
        await slow.send('{"prompt": "Again", "id": "the-slow-one-0002"}')
        (await puppet.reply(1)).say("here").end()
        texts = (await slow.until("the-slow-one-0002"))[start:]
        assert '"start"' in texts[0]


async def test_client_not_reading_is_aborted_after_send_timeout(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, send_timeout=1, grace=0, drain_timeout=0) as server:
        async with sluggard(server) as slow:
            await stuck(server, puppet, slow)
            async with asyncio.timeout(BOUND):
                await puppet.replies[0].closed.wait()  # no reader is left
            while await slow.read():
                pass
            assert not server.listener.connections


class Trickle:
    """The transport of a client that reads ``step`` bytes each time that the server looks."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.step = 1
        self.unsent = 100_000
        self.looks = 0

    def get_write_buffer_size(self) -> int:
        self.looks += 1
        self.unsent -= self.step
        return self.unsent

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


async def test_reader_of_one_byte_per_send_timeout_is_not_aborted(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, send_timeout=0.05, drain_timeout=0) as server,
        client(server),
    ):
        (socket,) = sockets_of(server)
        trickle = Trickle(socket.transport)
        socket.transport = cast("asyncio.Transport", trickle)
        socket.pause_writing()
        looks = trickle.looks
        await until(lambda: trickle.looks >= looks + 6)  # a check looks twice
        assert server.listener.connections
        trickle.step = 0
        await until(lambda: not server.listener.connections)


async def test_flood_of_tiny_frames_is_read_in_small_turns(
    server: wsserver.Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with sluggard(server) as slow, client(server) as other:
        assert all(len(socket.get_buffer(-1)) <= 8192 for socket in sockets_of(server))
        slow.protocol.send_ping(b"")
        (ping,) = slow.protocol.data_to_send()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(BOUND):
            await loop.sock_sendall(slow.sock, ping * 20_000)
        await other.quiet()
        slow.sock.close()
        await until(lambda: len(server.listener.connections) == 1)
    lines = [record for record in caplog.records if "socket.send()" in record.getMessage()]
    assert len(lines) < 2000


async def test_ping_flood_without_reading_aborts_connection(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with sluggard(server) as slow:
        (transport,) = sockets_of(server)
        highest = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(1000):
                await slow.ping(100)
                for _ in range(5):
                    await asyncio.sleep(0)
                highest = max(highest, transport.transport.get_write_buffer_size())
        # One read of the event loop may add this much.
        assert highest <= server.settings.max_unsent + 300_000
        assert not server.listener.connections
