"""A TCP or TLS server that sends exactly the bytes of a test, also malformed HTTP."""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Self

from tests.support.script import chunk

__all__ = ["Raw", "chunk", "head_of"]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def head_of(reader: asyncio.StreamReader) -> bytes:
    """Read a request with a Content-Length to its end, and return its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            await reader.readexactly(int(value))
    return head


class Raw:
    """Runs a handler for each connection; the connection closes when the handler returns.

    Attributes:
        port: the port of the server.
        accepted: connections so far, after their TLS handshake.
    """

    port: int

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self.accepted = 0
        self._handler = handler
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[Exception] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        if self._failures:
            raise ExceptionGroup("a handler failed", self._failures)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handler(reader, writer)
        except (asyncio.IncompleteReadError, OSError):  # the client has gone
            pass
        except Exception as error:  # noqa: BLE001
            self._failures.append(error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
