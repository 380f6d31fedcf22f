"""A TCP proxy that delays every byte, as a distant server would."""

import asyncio
from typing import Self

__all__ = ["Delay"]

Write = tuple[float, bytes]


class Delay:
    """A proxy in front of a server on this machine.

    A TCP handshake costs its client one round trip, which a proxy on this machine cannot delay by
    itself: the first bytes of each connection wait for one more round trip.

    Args:
        port: where the server listens.
        seconds: the delay in each direction.

    Attributes:
        port: where clients connect.
        accepted: connections so far.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self._target = port
        self._seconds = seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", self._target)
        handshake = asyncio.get_running_loop().time() + 2 * self._seconds
        try:
            await asyncio.gather(
                self._pass(reader, requests, handshake), self._pass(answers, writer, 0.0)
            )
        finally:
            for end in (writer, requests):
                end.transport.abort()

    async def _pass(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, earliest: float
    ) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Write] = asyncio.Queue()

        async def read() -> None:
            data = b"-"
            while data:
                data = await source.read(65536)
                began = max(loop.time(), earliest)
                queue.put_nowait((began + self._seconds, data))

        reading = loop.create_task(read())
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    to.write_eof() if to.can_write_eof() else to.close()
                    return
                to.write(data)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
