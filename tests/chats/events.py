"""A client of server-sent events that sees each event and its id."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Self

from tests.listening.answering import Browser
from wsserver import Server

__all__ = ["Chat"]

Event = dict[str, Any]


class Chat:
    """One connection to ``/api/chat``.

    Attributes:
        frames: the data of all events so far.
        last: the id of the last event.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.frames: list[Event] = []
        self.last = ""
        self._buffer = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, server: Server) -> AsyncIterator[Self]:
        async with Browser.open(server.listener) as browser:
            yield cls(browser)

    def send(
        self, method: str, target: str, body: object = None, headers: dict[str, str] | None = None
    ) -> None:
        """Send a request; a body that is no bytes is sent as JSON."""
        given = {"host": "localhost", **(headers or {})}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is not None:
            given = {"content-type": "application/json", "content-length": str(len(data)), **given}
        lines = [
            f"{method} {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in given.items()),
        ]
        self.browser.send("\r\n".join([*lines, "", ""]).encode(), b"" if body is None else data)

    async def ask(self, method: str, target: str, body: object = None, **given: Any) -> Any:
        """Send a request; return the status and the JSON of the response."""
        self.send(method, target, body, **given)
        status, data = await self.browser.response()
        return status, json.loads(data) if data else None

    async def prompt(self, body: object, **given: Any) -> Event:
        """Send a prompt; return its ``start``."""
        self.send("POST", "/api/chat", body, **given)
        status, headers = await self.browser.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream"), status
        return await self.next("start")

    async def resume(self, target: str, **given: Any) -> Event:
        """Go on with a reply; return its ``start``."""
        self.send("GET", target, **given)
        status, _ = await self.browser.head()
        assert status == 200
        return await self.next("start")

    async def next(self, *types: str) -> Event:
        """Skip events until one of these types, and return its frame."""
        while True:
            while b"\n\n" not in self._buffer:
                chunk = await self.browser.chunk()
                assert chunk, "the response has ended"
                self._buffer += chunk
            event, _, self._buffer = self._buffer.partition(b"\n\n")
            fields = dict(
                line.split(": ", 1)
                for line in event.decode().split("\n")
                if not line.startswith(":")
            )
            if "data" not in fields:
                continue
            self.last = fields.get("id", self.last)
            frame: Event = json.loads(fields["data"])
            self.frames.append(frame)
            if not types or frame["type"] in types:
                return frame

    async def text(self) -> tuple[str, Event]:
        """Return all text up to the terminal, and that."""
        terminal = await self.next("done", "error")
        assert await self.browser.chunk() == b""
        return self.said, terminal

    @property
    def said(self) -> str:
        return "".join(frame["text"] for frame in self.frames if frame["type"] == "token")
