"""Clients of each dialect that read one reply over many connections, each of which may be cut.

A client applies only whole events, as the standard of server-sent events says: it drops the rest of
a connection that ends within an event.
"""

import asyncio
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from tests.support.host import Host
from tests.support.proxy import reset
from tests.support.puppet import BOUND, Puppet, Thinking
from tests.support.story import Story, Transcript, joined

__all__ = ["READINGS", "AgUiReading", "AiSdkReading", "Reading", "SseReading", "Stream", "merged"]

LOST = (EOFError, ConnectionError)
Event = dict[str, str]


class Stream:
    """One response. Its events come one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._text = b""
        self.status = 0
        self._left: int | None = None  # bytes of a body that is not in chunks

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        port: int,
        target: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        drop: str = "fin",
    ) -> AsyncIterator["Stream"]:
        """Send a request: a POST of a body, or a GET. At the end, drop the connection.

        Raises:
            EOFError, ConnectionError: the head of the response is not whole.
        """
        async with asyncio.timeout(2 * BOUND):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                content = b"" if body is None else json.dumps(body).encode()
                given = {"host": "localhost", **(headers or {})}
                if body is not None:
                    given |= {"content-type": "application/json"}
                    given |= {"content-length": str(len(content))}
                lines = [f"{'GET' if body is None else 'POST'} {target} HTTP/1.1"]
                lines += [f"{name}: {value}" for name, value in given.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + content)
                stream = cls(reader, writer)
                await stream._begin()
                yield stream
            finally:
                if drop == "rst":
                    reset(writer.transport)
                else:
                    writer.close()

    async def _begin(self) -> None:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        self.status = int(head.split()[1])
        if "transfer-encoding: chunked" not in head:
            self._left = int(dict(re.findall(r"(\S+): (\S+)", head)).get("content-length", 0))

    async def body(self) -> bytes:
        """Return the rest of the body, which has to be whole."""
        body = self._text
        while chunk := await self._chunk():
            body += chunk
        return body

    async def _chunk(self) -> bytes:
        if self._left is not None:
            left, self._left = self._left, 0
            return await self._reader.readexactly(left)
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def event(self) -> Event | None:
        """Return the next event; None at the end of the whole body.

        Raises:
            EOFError, ConnectionError: the connection has ended before.
        """
        while True:
            while b"\n\n" not in self._text:
                chunk = await self._chunk()
                if not chunk:
                    assert not self._text, "the body ends with a whole event"
                    return None
                self._text += chunk
            event, _, self._text = self._text.partition(b"\n\n")
            lines = event.decode().split("\n")
            fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
            if "data" in fields:
                return fields


Said = list[tuple[str, str]]


def merged(pieces: Sequence[tuple[str, str]]) -> Said:
    """Return texts with their kinds, without empty ones, and with neighbours of one kind merged."""
    full = (piece for piece in pieces if piece[1])
    return [
        (kind, "".join(text for _, text in group))
        for kind, group in itertools.groupby(full, key=lambda piece: piece[0])
    ]


class Reading(ABC):
    """One client that reads the reply of a story.

    Attributes:
        ended: the client has the terminal, or knows that there is nothing more to read.
    """

    def __init__(self, server: Host, puppet: Puppet, said: Sequence[str], ending: str) -> None:
        self.server = server
        self.story = self.make(server, puppet, said, ending)
        self.ended = False
        self.asked = False  # the server has answered the prompt

    def make(self, server: Host, puppet: Puppet, said: Sequence[str], ending: str) -> Story:
        return Story(server, puppet, said, ending)

    @abstractmethod
    def request(self, *, turn: int) -> tuple[str, object, dict[str, str]]:
        """Return target, body and headers of the next request."""

    @abstractmethod
    def begin(self) -> None:
        """A response with events begins."""

    @abstractmethod
    def take(self, event: Event) -> None:
        """Apply an event."""

    @property
    @abstractmethod
    def behind(self) -> bool:
        """Whether the model has said more than the client has."""

    def nothing(self) -> None:
        """There is nothing to read (status 204)."""
        self.ended = True

    async def visit(
        self, port: int, events: int = 10**9, *, talk: int = 1, drop: str = "fin", turn: int = 0
    ) -> bool:
        """Read so many events over a new connection, and drop it; return whether it was lost.

        The model says more, and at last ends, once the client has everything.
        """
        target, body, headers = self.request(turn=turn)
        try:
            async with Stream.open(port, target, body, headers=headers, drop=drop) as stream:
                if stream.status == 204:
                    self.nothing()
                    return False
                if stream.status == 404:
                    assert not self.asked
                    return False
                assert stream.status == 200, await stream.body()
                self.asked = True
                self.begin()
                for _ in range(events):
                    while not self.behind and not self.story.over:  # pieces may be empty
                        await self.story.tell(max(1, min(talk, self.story.left)))
                    event = await stream.event()
                    if event is None:
                        assert self.ended, "a whole body ends with the terminal"
                        return False
                    assert not self.ended, "nothing follows the terminal"
                    self.take(event)
        except LOST:
            return True
        return False

    async def check(self) -> None:
        """Check that the client has the whole reply, and that the model was asked once."""
        assert self.ended
        assert len(self.story.replies()) == 1


class SseReading(Reading):
    """Frames as events. The client goes on after the last event, by a header or by the address."""

    def __init__(self, *story: Any) -> None:
        super().__init__(*story)
        self.transcript = Transcript(self.story)
        self.last = ""  # the id of the last event

    def request(self, *, turn: int) -> tuple[str, object, dict[str, str]]:
        target = f"/api/chat/{self.story.name}"
        if not self.last and turn % 2 == 0:
            return "/api/chat", self.story.prompt, {}
        if turn % 3:
            return target, None, {"last-event-id": self.last} if self.last else {}
        return f"{target}?after={self.transcript.last}", None, {}

    def begin(self) -> None:
        self.transcript.lose()
        self.begun = False

    def take(self, event: Event) -> None:
        frame = json.loads(event["data"])
        place = "end" if frame["type"] in {"done", "error"} else frame.get("seq", None)
        if frame["type"] == "start":
            assert not self.begun
            place = frame.get("after", 0)
        assert self.begun == (frame["type"] != "start")
        self.begun = True
        self.last = event["id"]
        assert self.last == f"{self.story.name}.{place}"
        self.transcript.take(frame)
        self.ended = self.transcript.terminal is not None

    @property
    def behind(self) -> bool:
        return self.story.seq > self.transcript.last

    async def check(self) -> None:
        await super().check()
        self.transcript.check()
        target = f"/api/chat/{self.story.name}"
        async with Stream.open(
            self.server.port, target, headers={"last-event-id": self.last}
        ) as stream:
            assert stream.status == 204
        async with Stream.open(self.server.port, f"{target}?after={self.transcript.last}") as again:
            frames = [await again.event(), await again.event(), await again.event()]
            start, terminal = (json.loads(event["data"]) for event in frames if event is not None)
            assert (start["type"], terminal) == ("start", self.transcript.terminal)


class ChatReading(Reading):
    """A dialect that has no places: each connection reads the reply from its start.

    A client that is cut off while it reads again what it had, after the end, keeps what it had.

    Attributes:
        heard: what this connection has given.
        before: the most that a connection before has given.
    """

    def __init__(self, *story: Any) -> None:
        super().__init__(*story)
        self.heard: Said = []
        self.before: Said = []
        self.expected = merged([(_kind(piece), piece) for piece in self.story.said])

    def begin(self) -> None:
        self.before = max(self.before, self.heard, key=_size)
        self.heard = []

    def nothing(self) -> None:
        super().nothing()
        self.heard = max(self.before, self.heard, key=_size)

    def hear(self, kind: str, text: str) -> None:
        assert text, "no event is empty"
        self.heard = merged([*self.heard, (kind, text)])
        assert _begins(self.expected, self.heard), (self.expected, self.heard)

    @property
    def behind(self) -> bool:
        told = merged([(_kind(piece), piece) for piece in self.story.said_so_far])
        return _size(self.heard) < _size(told)

    async def check(self) -> None:
        await super().check()
        assert self.heard == self.expected, (self.heard, self.expected)


class AiSdkReading(ChatReading):
    """The parts of a UI message, as ``useChat`` with ``resume`` reads them."""

    def __init__(self, *story: Any) -> None:
        super().__init__(*story)
        self.open: str | None = None
        self.types: list[str] = []

    def make(self, server: Host, puppet: Puppet, said: Sequence[str], ending: str) -> Story:
        return ChatStory(server, puppet, said, ending, path="/api/chat")

    async def visit(self, port: int, *args: Any, **given: Any) -> bool:
        if not (self.asked or self.story.replies()):  # a page that loads asks for a running reply
            async with Stream.open(self.server.port, self.running) as stream:
                assert stream.status == 204
        return await super().visit(port, *args, **given)

    @property
    def running(self) -> str:
        return f"/api/chat/{quote(self.story.name)}/stream"

    def request(self, *, turn: int) -> tuple[str, object, dict[str, str]]:
        name = self.story.name
        if self.asked or self.story.replies():
            return self.running, None, {}
        part = {"type": "text", "text": name}
        message = {"id": f"message-{name}", "role": "user", "parts": [part]}
        return "/api/chat", {"id": name, "messages": [message]}, {}

    def begin(self) -> None:
        super().begin()
        self.open, self.types = None, []

    def take(self, event: Event) -> None:
        assert "id" not in event
        if event["data"] == "[DONE]":
            assert self.types[-1] in {"finish", "error"}
            self.ended = True
            return
        part = json.loads(event["data"])
        kind, _, step = part["type"].rpartition("-")
        self.types.append(part["type"])
        assert self.types[:2] == ["start", "start-step"][: len(self.types)]
        assert not {"finish", "error"} & {*self.types[:-1]}
        if kind and step == "start":
            assert self.open is None
            self.open = kind + part["id"]
        elif step == "delta":
            assert self.open == kind + part["id"]
            self.hear({"text": "token", "reasoning": "thinking"}[kind], part["delta"])
        elif step == "end":
            assert self.open == kind + part["id"]
            self.open = None
        elif part["type"] in {"finish", "error"}:
            assert self.open is None
            assert (part["type"] == "error") == (self.story.ending == "error")
        else:
            assert part["type"] in {"start", "start-step", "finish-step", "message-metadata"}


class AgUiReading(ChatReading):
    """The events of a run, and of connections to its thread."""

    def make(self, server: Host, puppet: Puppet, said: Sequence[str], ending: str) -> Story:
        return ChatStory(server, puppet, said, ending, path="/agui")

    def __init__(self, *story: Any) -> None:
        super().__init__(*story)
        self.open: str | None = None

    def request(self, *, turn: int) -> tuple[str, object, dict[str, str]]:
        name = self.story.name
        message = {"id": f"message-{name}", "role": "user", "content": name}
        run: dict[str, object] = {"threadId": name, "runId": f"run-{turn}", "messages": [message]}
        run |= {"state": {}, "tools": [], "context": [], "forwardedProps": {"id": f"reply-{name}"}}
        if self.asked or self.story.replies():
            return "/agui/connect", run, {}
        return "/agui", run, {}

    def begin(self) -> None:
        self.open = None
        self.types: list[str] = []
        self.shown = {"assistant": "", "reasoning": "", "user": ""}
        super().begin()

    def take(self, event: Event) -> None:
        assert "id" not in event
        given = json.loads(event["data"])
        kind = given["type"]
        self.types.append(kind)
        assert self.types[0] == "RUN_STARTED"
        role = "thinking" if kind.startswith("REASONING") else "token"
        if kind.endswith("MESSAGE_START"):
            assert self.open is None
            self.open = role
        elif kind.endswith("MESSAGE_CONTENT"):
            assert self.open == role
            self.hear(role, given["delta"])
        elif kind.endswith("MESSAGE_END"):
            assert self.open == role
            self.open = None
        elif kind == "MESSAGES_SNAPSHOT":
            assert len(self.types) == 2
            for message in given["messages"]:
                self.shown[message["role"]] += message["content"]
        elif kind in {"RUN_FINISHED", "RUN_ERROR"}:
            assert self.open is None
            self.ended = True
            if not self.heard:
                self.end_again()

    def end_again(self) -> None:
        """Check the messages of a reply that had ended before; the client had all of it."""
        self.heard = self.before
        if self.expected and self.story.ending != "error":  # the history has no failed reply
            whole = joined(self.story.said)
            assert self.shown["assistant"] == whole["token"]
            assert self.shown["reasoning"] == whole["thinking"]

    async def check(self) -> None:
        await super().check()
        assert self.types[-1] in {"RUN_FINISHED", "RUN_ERROR"}


class ChatStory(Story):
    """A reply in a chat, whose id is the name of the story. Another client stops it by that."""

    def __init__(self, *story: Any, path: str) -> None:
        super().__init__(*story)
        self.path = path

    async def stop(self) -> None:
        async with Stream.open(self.server.port, f"{self.path}/{self.name}/stop", {}) as stream:
            assert stream.status == 200


def _kind(piece: str) -> str:
    return "thinking" if type(piece) is Thinking else "token"


def _size(said: Said) -> int:
    return sum(len(text) for _, text in said)


def _begins(whole: Said, part: Said) -> bool:
    """Whether the texts of a part are the beginning of the whole."""
    if not part:
        return True
    *full, (kind, text) = part
    if full != whole[: len(full)] or len(part) > len(whole):
        return False
    other, rest = whole[len(full)]
    return kind == other and rest.startswith(text)


READINGS: dict[str, type[Reading]] = {
    "sse": SseReading,
    "ai-sdk": AiSdkReading,
    "ag-ui": AgUiReading,
}
