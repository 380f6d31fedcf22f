"""A client of raw frames, with a bound on every wait."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.support.host import Host
from tests.support.puppet import BOUND

__all__ = ["Client", "Frame", "client"]

Frame = dict[str, Any]


class Client:
    """Sends frames as dicts or raw messages, and collects what comes back."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.frames: list[Frame] = []  # all received so far

    async def send(self, frame: Frame | str | bytes) -> None:
        await self.socket.send(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def prompt(self, text: str = "Hello", **keys: Any) -> Frame:
        """Send a prompt and return its ``start``, or the ``error`` that refuses it."""
        await self.send({"prompt": text, **keys})
        return await self.next("start", "error")

    @staticmethod
    def parse(message: str | bytes) -> Frame:
        frame: Frame = json.loads(message)
        return frame

    async def receive(self) -> Frame:
        async with asyncio.timeout(BOUND):
            frame = self.parse(await self.socket.recv())
        self.frames.append(frame)
        return frame

    async def next(self, *types: str, **values: Any) -> Frame:
        """Skip frames until one of these types, with these values, and return it."""
        while True:
            frame = await self.receive()
            fits = all(frame.get(key) == value for key, value in values.items())
            if (not types or frame["type"] in types) and fits:
                return frame

    async def text(self, generation: str) -> tuple[str, Frame]:
        """Return all text of a generation, and its terminal frame."""
        terminal = await self.next("done", "error", id=generation)
        return self.said(generation), terminal

    def said(self, generation: str, kind: str = "token") -> str:
        return "".join(
            frame["text"]
            for frame in self.frames
            if frame["type"] == kind and frame["id"] == generation
        )

    async def quiet(self) -> list[Frame]:
        """Return the frames that the server sent before its answer to a ping."""
        before = len(self.frames)
        await self.send({"type": "ping"})
        await self.next("pong")
        return self.frames[before:-1]

    async def closed(self) -> ConnectionClosed:
        """Read until the server closes the connection; return its exception."""
        try:
            while True:
                await self.receive()
        except ConnectionClosed as closed:
            return closed


@asynccontextmanager
async def client(server: Host, **options: Any) -> AsyncIterator[Client]:
    async with connect(server.url, proxy=None, **options) as socket:
        yield Client(socket)
