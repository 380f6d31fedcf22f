"""A proxy whose connections a test can cut and restore."""

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from typing import Self

from tests.support.proxy import reset

__all__ = ["Line"]


class Line:
    """A proxy in front of a local server.

    Attributes:
        url: the address for clients.
        port: the port of the server; a test may change it.
        tried: number of connections so far, including those that were refused.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.tried = 0
        self._whole = asyncio.Event()
        self._whole.set()
        self._deaf = False
        self._width: int | None = None
        self._ends: set[StreamWriter] = set()
        self._hushed: set[StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def connections(self) -> int:
        """Number of connections that are open, or are being closed."""
        return len(self._tasks)

    def cut(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._whole.clear()
        self._deaf = False
        self.reset()

    def reset(self) -> None:
        """Reset all connections; accept new ones."""
        for end in tuple(self._ends):
            reset(end.transport)

    def mend(self) -> None:
        """Accept new connections."""
        self._whole.set()

    def deafen(self) -> None:
        """Drop all data from the server, until the next cut."""
        self._deaf = True

    def hush(self) -> None:
        """Drop all data of the open connections, in both directions.

        Refuse new connections until :meth:`mend`.
        """
        self._whole.clear()
        self._hushed |= self._ends

    def narrow(self, width: int | None) -> None:
        """Cut each new connection after a number of bytes from the server; None: do not."""
        self._width = width

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.tried += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        ends = [writer]
        try:
            if not self._whole.is_set():
                return
            answers, requests = await asyncio.open_connection("127.0.0.1", self.port)
            ends.append(requests)
            self._ends.update(ends)
            up = self._pass(reader, requests, answering=False)
            down = self._pass(answers, writer, answering=True)
            await asyncio.gather(up, down)
        except OSError:
            pass
        finally:
            self._ends.difference_update(ends)
            for end in ends:
                reset(end.transport)

    async def _pass(self, source: StreamReader, to: StreamWriter, *, answering: bool) -> None:
        left = self._width if answering else None
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if to in self._hushed or (answering and self._deaf):
                    continue
                to.write(data[:left])
                await to.drain()
                if left is not None:
                    left -= len(data)
                    if left <= 0:
                        to.close()  # after the written bytes
                        await to.wait_closed()
                        return
        if to in self._hushed:  # the other side gets no FIN
            await asyncio.Event().wait()
        with contextlib.suppress(OSError):
            to.write_eof()
