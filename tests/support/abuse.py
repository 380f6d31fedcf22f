"""Clients that attack a server process, and measurements of that process from outside."""

import asyncio
import itertools
import json
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from websockets.asyncio.client import connect
from websockets.frames import Frame, Opcode

from tests.support.client import Client
from tests.support.process import Process, run
from tests.support.puppet import BOUND
from wsserver import Request

__all__ = [
    "HERE",
    "MEBIBYTE",
    "OTHER",
    "Peer",
    "Served",
    "certificate",
    "exchange",
    "frame",
    "meanwhile",
    "served",
    "talker",
]

MEBIBYTE = 2**20
HERE = "127.0.0.1"  # source address of the attacks
OTHER = "127.0.0.2"  # source address of other clients
METRICS_TOKEN = "for-whoever-looks-at-them"
OPERATOR = "127.0.0.3"  # source address of the client that reads the metrics
MODEL = "tests.support.abuse:talker"
ROOT = Path(__file__).parents[2]

T = TypeVar("T")


async def talker(request: Request) -> AsyncIterator[str]:
    """A model that obeys its prompt: ``talk NUMBER``, ``hang``, ``fail TEXT``."""
    what, _, rest = request.prompt.partition(" ")
    if what == "talk":
        for _ in range(int(rest)):
            yield "0123456789abcde "
            await asyncio.sleep(0)
    elif what == "hang":
        yield "here "
        await asyncio.get_running_loop().create_future()
    elif what == "fail":
        raise RuntimeError(rest)
    yield "fine"


class Served:
    """A server process, with its log, its metrics and its resources."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.pid = process.process.pid
        self.url = url
        self.port = int(url.rpartition(":")[2].strip("/"))
        self.tls = _anyone() if url.startswith("wss:") else None
        self.log: list[str] = []  # the lines so far

    async def read(self) -> None:
        """Read the log all the time, so that the server never waits to write it."""
        assert self.process.process.stdout is not None
        while line := await self.process.process.stdout.readline():
            self.log.append(line.decode())

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of an event. Every line of the log must be a JSON object."""
        events = [json.loads(line) for line in self.log if line.startswith("{")]
        return [event for event in events if event["event"] == name]

    async def said(self, name: str, **values: object) -> dict[str, Any]:
        """Wait until the log has an event with these values."""
        async with asyncio.timeout(BOUND):
            while True:
                for event in self.events(name):
                    if all(event.get(key) == value for key, value in values.items()):
                        return event
                await self.metrics()

    def status(self, name: str) -> int:
        """Return a number of ``/proc/PID/status``."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0])

    @property
    def memory(self) -> int:
        """Resident bytes of the process now."""
        return self.status("VmRSS") * 1024

    @property
    def peak(self) -> int:
        """The most resident bytes that the process ever had."""
        return self.status("VmHWM") * 1024

    @property
    def threads(self) -> int:
        return self.status("Threads")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    async def get(self, path: str, source: str = OPERATOR) -> tuple[int, str]:
        """Request a path; return the status, and the rest of the response with its headers."""
        async with Peer.open(self, source, tls=self.tls) as peer:
            head = f"Host: localhost\r\nAuthorization: Bearer {METRICS_TOKEN}\r\n"
            peer.write(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())
            answer = (await peer.rest()).decode()
            return int(answer.split()[1]), answer

    async def metrics(self) -> dict[str, float]:
        _, text = await self.get("/metrics")
        found = re.findall(r"^(wsserver_\S+?(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    async def reaches(self, **values: float) -> None:
        """Wait until metrics have these values."""
        wanted = {f"wsserver_{name}": value for name, value in values.items()}
        async with asyncio.timeout(BOUND):
            while not wanted.items() <= (await self.metrics()).items():
                pass

    @asynccontextmanager
    async def client(self, source: str = HERE, **options: Any) -> AsyncIterator[Client]:
        """Connect a client that follows the protocol."""
        options |= {} if self.tls is None else {"ssl": self.tls}
        async with connect(self.url, proxy=None, local_addr=(source, 0), **options) as socket:
            yield Client(socket)


@asynccontextmanager
async def served(
    *arguments: str,
    model: str = MODEL,
    bearer: str = "",
    descriptors: str = "",
    **env: str,
) -> AsyncIterator[Served]:
    """Run ``wsserver serve`` with these arguments until the end of the block."""
    command = ("-m", "wsserver", "serve", "--port", "0", "--store", "memory:", "--model", model)
    env["WSSERVER_METRICS_TOKEN"] = METRICS_TOKEN
    async with run(*command, *arguments, cwd=ROOT, descriptors=descriptors, **env) as process:
        server = Served(process, (await process.line(r"(wss?://\S+)"))[1])
        reading = asyncio.get_running_loop().create_task(server.read())
        try:
            async with server.client(OTHER, **_authorized(bearer)) as one:
                await exchange(server, one)  # the first request has imported everything
            yield server
            assert process.process.returncode is None, process.output + "".join(server.log)
        finally:
            reading.cancel()
            await asyncio.wait({reading})


async def certificate(folder: Path) -> Path:
    """Make a certificate for localhost; return the file with the certificate and its key."""
    file = folder / "site.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout - -out -"
    made = await asyncio.create_subprocess_exec(*command.split(), stdout=-1, stderr=-3)
    file.write_bytes((await made.communicate())[0])
    return file


def _anyone() -> ssl.SSLContext:
    """Trust any certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _authorized(bearer: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {bearer}"}} if bearer else {}


async def exchange(server: Served, chat: Client | None = None, count: int = 1) -> None:
    """Chat as a normal client, and check that the server serves it without delay."""
    if chat is None:
        async with server.client(OTHER) as one:
            await exchange(server, one, count)
        return
    for _ in range(count):
        await chat.send({"type": "ping"})
        assert (await chat.receive()) == {"type": "pong"}
        await chat.send({"messages": [{"role": "user", "content": "speak"}]})
        start = await chat.receive()
        assert start["type"] == "start", start
        text, done = await chat.text(start["id"])
        assert (text, done["reason"]) == ("fine", "end_turn"), done
        chat.frames.clear()


async def meanwhile(
    server: Served, abuse: Awaitable[T], *, least: int = 3, most: int = 1000, **options: Any
) -> T:
    """Run an attack while a normal client chats; return the result of the attack."""
    async with server.client(OTHER, **options) as other:
        abusing = asyncio.ensure_future(abuse)
        try:
            count = 0
            while (not abusing.done() and count < most) or count < least:
                await exchange(server, other)
                count += 1
            return await abusing
        finally:
            abusing.cancel()
            await asyncio.wait({abusing})


def frame(data: str | bytes = b"", opcode: Opcode = Opcode.TEXT, **options: Any) -> bytes:
    """Return a frame as a client writes it."""
    data = data.encode() if isinstance(data, str) else data
    return Frame(opcode, data, **options).serialize(mask=True)


class Peer:
    """A client that writes raw bytes, and reads only when the test reads."""

    HANDSHAKE = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    )

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(
        cls,
        server: Served,
        source: str = HERE,
        *,
        narrow: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        """Connect. A narrow client has a small receive buffer."""
        sock = socket.socket()
        sock.setblocking(False)
        if narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.bind((source, 0))
        async with asyncio.timeout(BOUND):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
            name = "" if tls else None
            ends = asyncio.open_connection(sock=sock, limit=2**14, ssl=tls, server_hostname=name)
            return cls(*await ends)

    @classmethod
    @asynccontextmanager
    async def open(cls, server: Served, source: str = HERE, **options: Any) -> AsyncIterator[Self]:
        """Connect, and drop the connection at the end of the block."""
        peer = await cls.connect(server, source, **options)
        try:
            yield peer
        finally:
            peer.drop()

    @classmethod
    @asynccontextmanager
    async def websocket(
        cls, server: Served, source: str = HERE, *, narrow: bool = False
    ) -> AsyncIterator[Self]:
        """Connect, and do the WebSocket handshake."""
        async with cls.open(server, source, narrow=narrow) as peer:
            assert b"101" in (await peer.upgrade()).split(b"\r\n")[0]
            yield peer

    async def upgrade(self, *headers: bytes) -> bytes:
        """Request a WebSocket; return the head of the response."""
        self.write(self.HANDSHAKE + b"".join(b"%b\r\n" % header for header in headers) + b"\r\n")
        async with asyncio.timeout(BOUND):
            return await self.reader.readuntil(b"\r\n\r\n")

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def flood(self, data: bytes, times: int | None = None) -> None:
        """Write many times without reading, until the server closes the connection."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with suppress(ConnectionError):
            async with asyncio.timeout(BOUND):
                for _ in itertools.count() if times is None else range(times):
                    self.writer.write(data)
                    await self.writer.drain()

    async def frame(self) -> tuple[int, bytes]:
        """Read one frame: its opcode and its payload."""
        async with asyncio.timeout(BOUND):
            first, length = await self.reader.readexactly(2)
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return first & 15, await self.reader.readexactly(length)

    async def texts(self) -> AsyncIterator[dict[str, Any]]:
        """Read all messages up to the close frame, or the end of the connection."""
        self.code = 1006
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                opcode, data = await self.frame()
                if opcode == Opcode.TEXT:
                    yield json.loads(data)
                elif opcode == Opcode.CLOSE:
                    self.code = int.from_bytes(data[:2])
                    return

    async def close_code(self) -> int:
        """Read up to the close frame; return its code, or 1006 without a close frame."""
        async for _ in self.texts():
            pass
        return self.code

    async def rest(self) -> bytes:
        """Read up to the end of the connection, by FIN or RST."""
        data = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(BOUND):
                while part := await self.reader.read(65536):
                    data += part
        return data

    def shut(self) -> None:
        """Close the writing side."""
        with suppress(OSError):  # the server has reset the connection
            self.writer.write_eof()

    def drop(self) -> None:
        """Drop the connection."""
        self.writer.transport.abort()
