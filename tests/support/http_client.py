"""Helpers of the tests of the HTTP client: a pool, a body reader, a server with one response."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.raw import Raw, head_of
from wsserver.models.dial import Origin
from wsserver.models.http import Pool, Template
from wsserver.models.response import Response

__all__ = [
    "CHUNKED",
    "LAST",
    "OK",
    "SECONDS",
    "Reader",
    "answering",
    "pool",
    "template",
    "whole",
]

SECONDS = 5  # bound of every wait
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


class Reader:
    """Keeps the bytes of a body, and waits for them."""

    def __init__(self, *, enough: bool = False) -> None:
        self.reads: list[bytes] = []
        self.read = asyncio.Semaphore(0)
        self._enough = enough

    def __call__(self, data: bytes) -> bool:
        self.reads.append(data)
        self.read.release()
        return self._enough

    @property
    def text(self) -> bytes:
        return b"".join(self.reads)


def template(port: int, host: str = "127.0.0.1", path: bytes = b"/v1/messages") -> Template:
    return Template.make(Origin("http", host, port, host), path, [(b"Host", b"api.example")])


def no_tls() -> ssl.SSLContext:
    raise AssertionError("no TLS here")


@asynccontextmanager
async def pool(limit: int = 10, connect_timeout: float = SECONDS) -> AsyncIterator[Pool]:
    made = Pool(limit, connect_timeout, no_tls)
    async with asyncio.timeout(2 * SECONDS):
        try:
            yield made
        finally:
            await made.aclose()


async def whole(response: Response) -> bytes:
    reader = Reader()
    try:
        await response.read_body(reader)
    finally:
        await response.aclose()
    return reader.text


@asynccontextmanager
async def answering(
    answer: bytes, *, close: bool = False
) -> AsyncIterator[tuple[Raw, list[bytes]]]:
    """Answer each request with these bytes; yield the server, and the heads of the requests."""
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heads.append(await head_of(reader))
            writer.write(answer)
            await writer.drain()
            if close:
                return

    async with Raw(handle) as raw:
        yield raw, heads
