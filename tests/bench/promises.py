"""Count the tokens after a stop, and the pieces lost or doubled after a lost connection.

The client of each server follows the documentation of that server: over WebSocket, or over HTTP
with the AI SDK's UI message stream.
"""

import asyncio
import json
import random
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Protocol
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect

from tests.bench.load import BOUND, Failure
from tests.bench.servers import Running, Upstream

REPLIES = 100
AT_ONCE = 20  # concurrent replies
STOP_RATE = 200  # tokens per second of a stopped reply: a fast model
RESUME_RATE = 50
PIECES = 50  # of a reply that is resumed
NUMBER = re.compile(r"@(\d{12})")
RNG_SEED = 13  # the same cuts for each server


class Talk(Protocol):
    """One reply, as a client of its server sees it."""

    async def ask(self) -> None: ...
    def read(self) -> AsyncIterator[None]: ...
    async def stop(self) -> None: ...
    async def resume(self) -> None: ...
    def cut(self) -> None: ...
    def pieces(self) -> list[int]: ...


class WebSocketTalk:
    """A reply in `token` frames. Servers with `seq` can resume it."""

    def __init__(self, url: str, number: int) -> None:
        self.url = url
        self.prompt = {"prompt": f"go #{number}", "id": uuid.uuid4().hex}
        self.socket: ClientConnection | None = None
        self.text = ""
        self.seq = 0

    async def _send(self, frame: dict[str, Any]) -> None:
        assert self.socket is not None
        await self.socket.send(json.dumps(frame))

    async def _connect(self) -> None:
        self.socket = await connect(self.url, proxy=None, compression=None)

    async def ask(self) -> None:
        await self._connect()
        await self._send(self.prompt)

    async def read(self) -> AsyncIterator[None]:
        """Yield after each frame with text, until the reply ends."""
        assert self.socket is not None
        async for message in self.socket:
            frame = json.loads(message)
            if frame["type"] == "token":
                self.text += frame["text"]
                self.seq = frame.get("seq", 0)
                yield
            elif frame["type"] == "error" and frame.get("code") == "not_found":
                await self._send(self.prompt)  # the prompt has not arrived: send it again
            elif frame["type"] in {"done", "error"}:
                break
        self.cut()

    async def stop(self) -> None:
        await self._send({"type": "stop"})

    async def resume(self) -> None:
        await self._connect()
        await self._send({"type": "resume", "id": self.prompt["id"], "after": self.seq})

    def cut(self) -> None:
        if self.socket is not None:
            self.socket.transport.abort()

    def pieces(self) -> list[int]:
        return [int(number) for number in NUMBER.findall(self.text)]


class HttpTalk:
    """A reply of the AI SDK: server-sent events, and a chat that can be loaded and resumed."""

    def __init__(self, url: str, number: int) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.address = (parts.hostname, parts.port)
        self.chat = uuid.uuid4().hex
        self.number = number
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.text = ""

    async def _request(self, method: str, path: str, body: object = None) -> int:
        """Send a request on a new connection; return the status."""
        content = b"" if body is None else json.dumps(body).encode()
        self.reader, self.writer = await asyncio.open_connection(*self.address)
        head = f"{method} /api/chat{path} HTTP/1.0\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        head, *_ = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        return int(head.split()[1])

    async def ask(self) -> None:
        part = {"type": "text", "text": f"go #{self.number}"}
        message = {"id": "user", "role": "user", "parts": [part]}
        await self._request("POST", "", {"id": self.chat, "message": message})

    async def read(self) -> AsyncIterator[None]:
        """Yield after each text, until the reply ends."""
        assert self.reader is not None
        async for line in self.reader:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["type"] == "start":
                self.text = ""  # a resumed stream is a full replay
            elif chunk["type"] == "text-delta":
                self.text += chunk["delta"]
                yield
        self.cut()

    async def stop(self) -> None:
        reading = self.writer
        await self._request("POST", f"/{self.chat}/stop", {})
        self.cut()
        self.writer = reading
        self.cut()

    async def resume(self) -> None:
        """Load the chat, as a page does, and resume its active stream."""
        await self._request("GET", f"/{self.chat}")
        assert self.reader is not None
        messages = json.loads(await self.reader.read())["messages"]
        self.cut()
        for message in messages:
            if message["role"] == "assistant":
                self.text = "".join(p["text"] for p in message["parts"] if p["type"] == "text")
        await self._request("GET", f"/{self.chat}/stream")

    def cut(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()

    def pieces(self) -> list[int]:
        return [int(number) for number in NUMBER.findall(self.text)]


def talk(running: Running, number: int) -> Talk:
    kind = HttpTalk if running.server.http else WebSocketTalk
    return kind(running.url, number)


async def read_pieces(reply: Talk, count: int | None = None) -> None:
    """Read `count` pieces, or the whole reply."""
    async for _ in reply.read():
        if count is not None and len(reply.pieces()) >= count:
            return


async def in_batches(talks: list[Talk], each: Any) -> None:
    for start in range(0, len(talks), AT_ONCE):
        async with asyncio.timeout(BOUND), asyncio.TaskGroup() as group:
            for reply in talks[start : start + AT_ONCE]:
                group.create_task(each(reply))


def after_stop(running: Running, upstream: Upstream) -> dict[str, float]:
    """Stop running replies; count the tokens that the model writes after each stop."""
    upstream.plan(tokens=5 * STOP_RATE, rate=STOP_RATE, numbered=True)
    chance = random.Random(RNG_SEED)
    stopped: dict[int, float] = {}
    talks = {number: talk(running, number) for number in range(1, REPLIES + 1)}
    numbers = {id(reply): number for number, reply in talks.items()}

    async def each(reply: Talk) -> None:
        await reply.ask()
        await read_pieces(reply, chance.randint(10, 60))
        stopped[numbers[id(reply)]] = monotonic()
        await reply.stop()
        await asyncio.sleep(1)  # a model that was not stopped writes 200 tokens meanwhile
        reply.cut()

    asyncio.run(in_batches(list(talks.values()), each))
    writes = upstream.writes()
    if len(writes) < REPLIES:
        raise Failure(f"only {len(writes)} of {REPLIES} prompts reached the upstream")
    late = [sum(moment > at for moment in writes[number]) for number, at in stopped.items()]
    return {"tokens": sum(late)}


def resumed(running: Running, upstream: Upstream) -> dict[str, float]:
    """Cut each reply once, at a random piece, and resume it; count lost and doubled pieces."""
    upstream.plan(tokens=PIECES, rate=RESUME_RATE, numbered=True)
    chance = random.Random(RNG_SEED)
    talks = [talk(running, number) for number in range(1, REPLIES + 1)]

    async def each(reply: Talk) -> None:
        count = chance.randrange(PIECES)
        await reply.ask()
        if count:
            await read_pieces(reply, count)
        reply.cut()
        await asyncio.sleep(chance.uniform(0, 0.1))
        await reply.resume()
        await read_pieces(reply)

    asyncio.run(in_batches(talks, each))
    lost = doubled = 0
    for reply in talks:
        found = Counter(reply.pieces())
        lost += sum(1 for piece in range(PIECES) if not found[piece])
        doubled += sum(count - 1 for count in found.values() if count > 1)
    return {"lost": lost, "doubled": doubled}
