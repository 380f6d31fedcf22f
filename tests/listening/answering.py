"""A listener without an application: the test answers the requests."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Self

from tests.support.certificate import certificate, tls_server
from tests.support.puppet import BOUND, until
from wsserver import Settings
from wsserver.admission import Admission, Visitor
from wsserver.limits import Memory
from wsserver.responses import Answer, BadRequest, BodyWriter, Request
from wsserver.sockets.listener import Listener
from wsserver.telemetry import Metrics

__all__ = ["Browser", "Recorder", "listening", "name_of", "trusted"]


@contextlib.asynccontextmanager
async def listening(
    answer: Callable[[Request, Visitor], Awaitable[Answer]],
    *,
    tls: bool = False,
    **given: object,
) -> AsyncIterator[Listener]:
    """Listen on a free port. At the end no memory may be counted."""
    settings = Settings.load(**given)
    memory = Memory(settings.memory)

    async def respond(request: Request, visitor: Visitor | None) -> Answer:
        assert visitor is not None
        try:
            return await answer(request, visitor)
        except BadRequest as bad:
            return bad.response

    listener = Listener(
        settings,
        respond,
        memory,
        Metrics(),
        admission=Admission(settings, None),
        on_denied=lambda *_: None,
        tls=tls_server() if tls else None,
    )
    await listener.bind(("127.0.0.1", 0))
    listener.serve()
    try:
        yield listener
    finally:
        listener.stop_listening()
        listener.abort()
        async with asyncio.timeout(BOUND):
            await listener.wait_closed()
    await until(lambda: memory.used == 0)
    assert not listener.connections


def trusted() -> ssl.SSLContext:
    """Return the TLS context of a client that trusts :func:`listening`."""
    return ssl.create_default_context(cadata=certificate())


def name_of(test: object) -> str:
    """Return the id of a test to run on another event loop."""
    if isinstance(test, partial):
        given = ", ".join(str(value) for name, value in test.keywords.items() if name != "sent")
        return f"{test.func.__name__}-{given}"
    return getattr(test, "__name__", str(test))


class Browser:
    """A client connection of raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, listener: Listener, *, limit: int = 2**16) -> AsyncIterator[Self]:
        port = listener.bound[0].getsockname()[1]
        tls = None if listener.tls is None else trusted()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, limit=limit)
        try:
            async with asyncio.timeout(BOUND):
                yield cls(reader, writer)
        finally:
            writer.transport.abort()

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the headers of the next response."""
        status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines)

    async def response(self) -> tuple[int, bytes]:
        """Return the status and the body of the next response."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, await self.chunks()
        return status, await self.reader.readexactly(int(headers["content-length"]))

    async def chunk(self) -> bytes:
        """Return the next chunk; the last one is empty."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def chunks(self) -> bytes:
        body = b""
        while part := await self.chunk():
            body += part
        return body

    async def ended(self) -> bool:
        """Wait for the end of the connection; return whether no byte came before it."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


class Recorder:
    """The producer of one streamed response, controlled by a test."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.gone = asyncio.Event()
        self.woken = asyncio.Event()
        self.body: BodyWriter

    def open(self, body: BodyWriter) -> None:
        self.body = body
        self.opened.set()

    def wake(self) -> None:
        assert self.body.writable
        self.woken.set()

    def closed(self) -> None:
        assert not self.gone.is_set(), "it is told once"
        self.gone.set()
