"""A proxy that cuts each connection after a number of bytes from the server."""

import asyncio
import contextlib
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections import deque
from dataclasses import dataclass
from typing import Self

__all__ = ["Cut", "Proxy", "reset"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where and how a connection is cut.

    Args:
        after: number of bytes from the server that the client gets.
        reset: with RST instead of FIN.
        late: when the next byte arrives, instead of right after the last one.
    """

    after: int
    reset: bool = False
    late: bool = False


class Proxy:
    """A proxy in front of a local server. Each connection gets the next cut, until none is left.

    Attributes:
        port, url: what clients connect to.
        passed: number of bytes that the client got, per connection.
    """

    def __init__(self, port: int, *cuts: Cut) -> None:
        self._port = port
        self._cuts = deque(cuts)
        self._lines: set[asyncio.Task[None]] = set()
        self.passed: list[int] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for line in self._lines:
            line.cancel()
        failures = await asyncio.gather(*self._lines, return_exceptions=True)
        await self._server.wait_closed()
        for failure in failures:
            if isinstance(failure, Exception):
                raise failure

    @property
    def cuts(self) -> int:
        """Number of cuts left."""
        return len(self._cuts)

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        cut = self._cuts.popleft() if self._cuts else None
        line = asyncio.get_running_loop().create_task(self._serve(reader, writer, cut))
        self._lines.add(line)

    async def _serve(self, reader: StreamReader, writer: StreamWriter, cut: Cut | None) -> None:
        number = len(self.passed)
        self.passed.append(0)
        ends = [writer]
        try:
            answers, requests = await asyncio.open_connection("127.0.0.1", self._port)
            ends.append(requests)
            upward = asyncio.get_running_loop().create_task(_pass_all(reader, requests))
            try:
                with contextlib.suppress(OSError):
                    await self._answer(answers, writer, cut, number)
            finally:
                upward.cancel()
                await asyncio.gather(upward, return_exceptions=True)
            if cut is not None and cut.reset:
                for end in ends:
                    reset(end.transport)
            else:
                with contextlib.suppress(OSError):
                    requests.close()
                    writer.write_eof()
                    while await reader.read(65536):  # unread data turns the FIN into a RST
                        pass
        finally:
            for end in ends:
                end.close()

    async def _answer(
        self, answers: StreamReader, writer: StreamWriter, cut: Cut | None, number: int
    ) -> None:
        """Pass on bytes of the server until it disconnects, or until the cut."""
        # The kernel has all passed bytes, so a reset loses none of them.
        writer.transport.set_write_buffer_limits(high=0)
        while cut is None or cut.late or self.passed[number] < cut.after:
            left = 65536 if cut is None else cut.after - self.passed[number]
            data = await answers.read(max(1, left))
            if not data or left == 0:
                return
            writer.write(data)
            self.passed[number] += len(data)
            await writer.drain()


async def _pass_all(reader: StreamReader, writer: StreamWriter) -> None:
    """Pass on bytes of a client until it disconnects, and then disconnect from the server."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def reset(transport: asyncio.WriteTransport) -> None:
    """End a connection with a RST, unless it has ended already."""
    sock = transport.get_extra_info("socket")
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
