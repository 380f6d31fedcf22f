"""Plays the sequences of ``PROTOCOL.md`` to the real server, by raw frames and a puppet."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

import wsserver
from tests.support.puppet import BOUND, Puppet, Reply, until
from tests.support.schemas import OF_CLIENT, OF_SERVER
from tests.support.sequences import Frame, Line, alike, renamed
from wsserver import Code, End, Handshake, ModelError, Principal, Server, Thinking, Usage
from wsserver.content import Block, parse_block, parse_content
from wsserver.models.base import Output
from wsserver.protocol import SUBPROTOCOL

__all__ = ["play_to_server"]

MODEL = "claude-sonnet-4-6"


@dataclass
class _Socket:
    """A connection of raw frames, and its received frames that no line has matched yet."""

    connection: ClientConnection
    names: dict[str, str]  # ids of the vector, by the ids that the server chose
    inbox: list[Frame] = field(default_factory=list)

    async def receive(self) -> None:
        async with asyncio.timeout(BOUND):
            frame = json.loads(await self.connection.recv())
        OF_SERVER.validate(frame)
        self.inbox.append(renamed(frame, self.names))

    async def take(self, fits: Callable[[Frame], bool]) -> Frame:
        """Return the first frame that matches, and keep the frames before it."""
        while True:
            for frame in self.inbox:
                if fits(frame):
                    self.inbox.remove(frame)
                    return frame
            await self.receive()

    async def settle(self) -> None:
        """Wait until the server has read all sent frames."""
        await self.connection.send('{"type":"ping"}')
        await self.take(lambda frame: frame["type"] == "pong")


class _Play:
    """One sequence, played to the real server by raw frames and a puppet."""

    def __init__(self, folder: Path, lines: list[Line]) -> None:
        self._folder = folder
        self._lines = lines
        self._puppet = Puppet()
        self._puppet.name = MODEL
        self._asks = any(line.get("frame", {}).get("type") == "auth" for line in lines)
        self._stack = contextlib.AsyncExitStack()
        self._server: Server
        self._started = 0
        self._closing: asyncio.Task[None] | None = None
        self._sockets: dict[int, _Socket] = {}
        self._asked: dict[str, tuple[Block, ...]] = {}  # the blocks of prompts, by id
        self._replies: dict[str, Reply] = {}
        self._said: dict[str, int] = {}  # seq of the last piece that the model was told to say
        self._over: set[str] = set()  # generations that the model was told to end
        self._last: int | None = None  # the socket that sent last
        self._names: dict[str, str] = {}
        frames = [line["frame"] for line in lines if line.get("from") == "client"]
        self._unnamed = not any("id" in frame for frame in frames)

    async def __aenter__(self) -> Self:
        await self._serve()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _serve(self) -> None:
        self._started += 1

        async def who(token: str | None, _: Handshake) -> Principal | None:
            if token is None or not token.startswith("alice"):
                return None
            return Principal("alice", time.time() + 3600)

        self._server = wsserver.serve(
            self._puppet,
            port=0,
            store=f"sqlite:///{self._database}",
            drain_timeout=BOUND if self._has("draining") else 0,
            authenticate=who if self._asks else None,
        )
        await self._stack.enter_async_context(self._server)

    @property
    def _database(self) -> Path:
        return self._folder / f"{self._started}.sqlite"

    def _has(self, event: str) -> bool:
        return any(line.get("event") == event for line in self._lines)

    async def play(self) -> None:
        lines = list(self._lines)
        # The server wrote these before it read the client's frame above them.
        for place in range(1, len(lines)):
            if lines[place].get("crossing"):
                lines[place - 1], lines[place] = lines[place], lines[place - 1]
        for number, line in enumerate(lines):
            try:
                async with asyncio.timeout(BOUND):
                    await self._step(line)
            except (AssertionError, TimeoutError, ConnectionClosed) as error:
                inbox = {name: socket.inbox for name, socket in self._sockets.items()}
                raise AssertionError(f"line {number}, {line}: {error!r}; {inbox}") from error
        for socket in self._sockets.values():
            with contextlib.suppress(ConnectionClosed):
                await socket.settle()
            assert not socket.inbox

    async def _step(self, line: Line) -> None:
        if "event" in line:
            await self._event(line)
        elif line["from"] == "client":
            await self._send(line["socket"], line["frame"])
        else:
            await self._expect(line["socket"], line["frame"])

    async def _socket(self, number: int) -> _Socket:
        if number not in self._sockets:
            await self._connect(number)
        return self._sockets[number]

    async def _connect(self, number: int) -> None:
        connecting = connect(self._server.url, proxy=None, subprotocols=[Subprotocol(SUBPROTOCOL)])
        socket = self._sockets[number] = _Socket(
            await self._stack.enter_async_context(connecting), self._names
        )
        await socket.take(lambda frame: frame["type"] == "hello")

    async def _event(self, line: Line) -> None:
        match line["event"]:
            case "lost":
                self._sockets[1].connection.transport.abort()
            case "connected":
                if self._closing is not None:
                    await self._closing
                    await self._serve_again(self._database)
                await self._connect(1)
            case "closed":
                with contextlib.suppress(ConnectionClosed):
                    await self._sockets[1].take(lambda _: False)
                assert self._sockets[1].connection.close_code == line["code"]
            case "expired":
                for connection in self._server.app.connections.values():
                    connection.shut_out("The token has expired.")
            case "draining":
                self._closing = asyncio.create_task(self._server.close())
                await until(lambda: self._server.app.hub.scheduler.draining)
            case "crashed":
                await self._serve_again(self._folder / "saved.sqlite")

    async def _serve_again(self, saved: Path) -> None:
        """Start a server on the file of an earlier server."""
        for suffix in ("", "-wal"):
            source = saved.with_name(saved.name + suffix)
            if source.exists():
                shutil.copy(source, self._folder / f"{self._started + 1}.sqlite{suffix}")
        await self._serve()

    async def _save(self) -> None:
        """Copy the file as it is now, for a server after a crash."""
        await self._server.app.hub.journal.flush()
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(f"{self._database}{suffix}", self._folder / f"saved.sqlite{suffix}")

    async def _send(self, number: int, frame: Frame) -> None:
        OF_CLIENT.validate(frame)
        if self._last not in {None, number}:
            await self._sockets[self._last or 0].settle()
        socket = await self._socket(number)
        self._last = number
        if "prompt" in frame:
            name = frame.get("id", "ID-0123456789abcdef")
            self._asked.setdefault(name, parse_content(frame["prompt"]))
        elif "messages" in frame:
            self._asked[frame["id"]] = parse_content(frame["messages"][-1]["content"])
        await socket.connection.send(json.dumps(frame))

    async def _expect(self, number: int, frame: Frame) -> None:
        await self._cue(frame)
        socket, name, kind = await self._socket(number), frame.get("id"), frame["type"]
        if kind in {"token", "thinking", "block"}:
            seen = await socket.take(lambda frame: frame.get("id") == name)
            while seen["seq"] < frame["seq"]:
                part = await socket.take(lambda frame: frame.get("id") == name)
                seen = part | {"text": seen["text"] + part["text"]}
            assert seen == frame
            return
        if kind == "start" and self._unnamed:
            self._unnamed = False
            start = await socket.take(lambda frame: frame["type"] == "start")
            self._names |= {start[key]: frame[key] for key in ("id", "conversation")}
            socket.inbox.insert(0, renamed(start, self._names))
        seen = await socket.take(
            lambda seen: seen.get("id") == name and (name is not None or seen["type"] == kind)
        )
        assert alike(seen, frame), seen

    async def _cue(self, frame: Frame) -> None:
        """Have the model cause a frame of the server."""
        name, kind = frame.get("id"), frame["type"]
        if name is None or kind == "start" or name in self._over:
            return
        if kind in {"token", "thinking", "block"}:
            said = self._said.get(name, 0)
            if (count := frame["seq"] - said) > 0:
                if self._has("crashed"):
                    await self._save()
                reply = await self._reply(name)
                reply.say(*_outputs(frame, count))
                self._said[name] = frame["seq"]
        elif kind == "done" and frame["reason"] != "stopped":
            self._over.add(name)
            usage = Usage(**frame["usage"])
            (await self._reply(name)).say(End(frame["reason"], usage)).end()
        elif kind == "error" and frame["code"] != Code.INTERRUPTED:
            self._over.add(name)
            (await self._reply(name)).fail(ModelError(frame["code"]))

    async def _reply(self, name: str) -> Reply:
        """Wait until the model has the prompt of a generation."""
        if name not in self._replies:
            blocks, taken = self._asked[name], list(self._replies.values())

            def asked() -> list[Reply]:
                return [
                    reply
                    for reply in self._puppet.replies
                    if reply.request.messages[-1].blocks == blocks and reply not in taken
                ]

            await until(asked)
            self._replies[name] = asked()[0]
        return self._replies[name]


def _outputs(frame: Frame, count: int) -> list[Output]:
    """Return the output of a model for a frame of a number of pieces."""
    if frame["type"] == "block":
        return [parse_block(json.loads(frame["partial_json"]))]
    if "signature" in frame:
        return [Thinking("", frame["signature"])]
    texts = [*frame["text"][: count - 1], frame["text"][count - 1 :]]
    return [Thinking(text) if frame["type"] == "thinking" else text for text in texts]


async def play_to_server(lines: list[Line], folder: Path) -> None:
    """Send the client's lines to a server, and compare its frames with the server's lines.

    Args:
        lines: of one sequence.
        folder: for the databases of the servers.
    """
    async with _Play(folder, lines) as play:
        await play.play()
