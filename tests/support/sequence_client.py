"""Plays the sequences of ``PROTOCOL.md`` to a client, as a scripted server."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.support.puppet import BOUND, until
from tests.support.schemas import OF_CLIENT
from tests.support.sequences import Frame, Line, renamed
from wsserver import Code
from wsserver.parsing import parse
from wsserver.protocol import ANSWERS, SUBPROTOCOL

__all__ = ["Client", "ScriptedServer"]

ANSWERED = frozenset({"history", "renamed", "deleted", "conversations"})
DEFAULTS = {"on_busy": "reject", "after": 0, "limit": 20}
LIMITS = {
    "message_size": 65536,
    "prompt_size": 32768,
    "answer_size": 229376,
    "frame_rate": 5.0,
    "frame_burst": 40,
    "bad_frames": 20,
    "requests": 32,
    "generations_per_socket": 4,
    "queue_size": 8,
}


class Client(Protocol):
    """Drives a client. A reply has the id of the vector as its name."""

    async def prompt(
        self,
        reply: str,
        text: str | list[Frame],
        conversation: str | None,
        on_busy: str,
        retry_of: str | None,
    ) -> None:
        """Send a prompt, without waiting. A list has messages."""
        ...

    async def stop(self, reply: str) -> None:
        """Stop a reply, without waiting."""
        ...

    async def resume(self, reply: str, of: str | None, named: str | None) -> None:
        """Resume a reply from its beginning: that of the name ``of``, or of the id ``named``."""
        ...

    async def seen(self, reply: str) -> dict[str, Any]:
        """Return ``started``, ``text``, ``thinking``, ``done`` and ``error`` of a reply."""
        ...

    async def request(self, kind: str, **keys: Any) -> Any:
        """Send ``open``, ``conversations``, ``rename`` or ``delete``; return the answer.

        The answer has the form of an exchange. ``open`` without ``before`` also follows.
        """
        ...

    async def close_conversation(self, conversation: str) -> None:
        """Close an open conversation, unless the client closes it by itself."""
        ...


@dataclass
class _Shown:
    """The state of a reply that the client has to show."""

    name: str
    seq: int = 0
    text: dict[str, str] = field(default_factory=lambda: {"token": "", "thinking": ""})
    started: bool = False
    terminal: Frame | None = None

    def take(self, frame: Frame) -> None:
        if frame["type"] == "start":
            self.started = True
            if frame.get("after", 0) < self.seq:  # the server sends all that it has
                self.seq = frame.get("after", 0)
                self.text = {"token": "", "thinking": ""}
        elif frame["type"] in {"done", "error"}:
            self.terminal = frame
        elif frame["seq"] > self.seq:
            self.seq = frame["seq"]
            if frame["type"] in self.text:
                self.text[frame["type"]] += frame["text"]

    def fits(self, seen: dict[str, Any]) -> bool:
        if (seen["text"], seen["thinking"]) != (self.text["token"], self.text["thinking"]):
            return False
        if self.terminal is None:
            return bool(seen["started"]) is self.started and not (
                seen.get("done") or seen.get("error")
            )
        done = self.terminal["type"] == "done"
        keys = ("reason", "by") if done else ("code", "retryable")
        end = seen.get("done" if done else "error")
        return end is not None and all(end.get(key) == self.terminal.get(key) for key in keys)


class ScriptedServer:
    """A server that plays one socket of a sequence to a client.

    Args:
        lines: the lines of the sequence.
        socket: the number of the socket whose lines the client plays.

    Attributes:
        url: the address for the client.
        tokens: the tokens of the client's ``auth`` frames.
    """

    def __init__(self, lines: list[Line], socket: int = 1) -> None:
        self._lines = [line for line in lines if line.get("socket", socket) == socket]
        frames = [line["frame"] for line in self._lines if "frame" in line]
        self.tokens: list[str] = [frame["token"] for frame in frames if frame.get("type") == "auth"]
        self._connections: asyncio.Queue[ServerConnection] = asyncio.Queue()
        self._connection: ServerConnection
        self._inbox: asyncio.Queue[Frame] = asyncio.Queue()
        self._ids: dict[str, str] = {}  # the client's, by the vector's
        self._unanswered: list[tuple[Frame, Frame]] = []  # the vector's frame, and the client's
        self._shown: dict[str, _Shown] = {}  # by the id that the vector has
        self._closed: set[str] = set()  # conversations that the client has closed by itself
        self._request: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Self:
        self._server = await serve(
            self._accept, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)]
        )
        port = next(iter(self._server.sockets)).getsockname()[1]
        self.url = f"ws://127.0.0.1:{port}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _accept(self, connection: ServerConnection) -> None:
        hello: Frame = {"type": "hello", "protocol": SUBPROTOCOL, "limits": LIMITS}
        if self.tokens:
            hello["auth"] = True
        await connection.send(json.dumps(hello))
        self._connections.put_nowait(connection)
        with contextlib.suppress(ConnectionClosed):
            async for message in connection:
                frame = json.loads(message)
                OF_CLIENT.validate(frame)
                if frame["type"] == "ping":
                    await connection.send(json.dumps(_answering(frame, {"type": "pong"})))
                elif frame["type"] == "close":
                    self._closed.add(frame["conversation"])
                    closed = {"type": "closed", "conversation": frame["conversation"]}
                    await connection.send(json.dumps(_answering(frame, closed)))
                else:
                    self._inbox.put_nowait(frame)

    async def play(self, client: Client) -> None:
        """Let the client play its lines, and check its frames and its state.

        Raises:
            AssertionError: a frame or the state differs from the sequence.
        """
        async with asyncio.timeout(BOUND):
            self._connection = await self._connections.get()
        while self._lines:
            line = self._lines.pop(0)
            try:
                async with asyncio.timeout(BOUND):
                    await self._step(line, client)
            except (AssertionError, TimeoutError, ConnectionClosed) as error:
                seen = {name: await client.seen(shown.name) for name, shown in self._shown.items()}
                raise AssertionError(f"{line}: {error!r}; {seen}") from error
        assert self._inbox.empty()

    async def _step(self, line: Line, client: Client) -> None:
        if "event" in line:
            await self._event(line)
        elif line["from"] == "client":
            await self._receive(line["frame"], client)
        else:
            await self._send(line["frame"], client)

    async def _event(self, line: Line) -> None:
        match line["event"]:
            case "lost" | "crashed":
                self._connection.transport.abort()
            case "closed":
                reason = "unauthenticated" if self.tokens else ""
                await self._connection.close(line["code"], reason)
            case "connected":
                self._connection = await self._connections.get()

    async def _receive(self, frame: Frame, client: Client) -> None:
        kind = frame.get("type", "prompt")
        # An id that the server chooses is in the vector's `start`.
        name = frame.get("id") or str(self._lines[0]["frame"].get("id"))
        shown = self._shown.get(name)
        if kind == "ping":  # the reader answers each, as a client pings when it likes
            del self._lines[0]
            return
        if kind == "close":
            await client.close_conversation(frame["conversation"])
            await until(lambda: frame["conversation"] in self._closed)
            del self._lines[0]  # its answer
            return
        if kind == "prompt" and shown is None:
            self._shown[name] = _Shown(name)
            await client.prompt(
                name,
                frame.get("prompt") or frame["messages"],
                frame.get("conversation"),
                frame.get("on_busy", "reject"),
                frame.get("retry_of"),
            )
        elif kind == "resume" and (shown is None or shown.terminal is not None):
            self._shown[name] = _Shown(f"{name} again", seq=frame.get("after", 0))
            known = None if shown is None else shown.name
            await client.resume(f"{name} again", known, None if known else name)
        elif kind == "stop":
            await client.stop(self._shown[name].name)
        elif kind in {"open", "list", "rename", "delete"}:
            keys = {key: frame[key] for key in frame.keys() - {"type", "request", "limit"}}
            asking = client.request("conversations" if kind == "list" else kind, **keys)
            self._request = asyncio.ensure_future(asking)
        # The client sends all other frames by itself.
        sent = await self._inbox.get()
        self._match(frame, sent)
        if kind == "auth":  # a client may wait for the answer
            answer = next(line for line in self._lines if line.get("from") == "server")
            self._lines.remove(answer)
            await self._send(answer["frame"], client)

    def _match(self, frame: Frame, sent: Frame) -> None:
        """Compare a client's frame with the vector's; note the ids that the client chose."""
        for key in sent.keys() & {"id", "conversation"}:
            # An id that the server chooses is in the vector's `start`.
            self._ids.setdefault(frame.get(key) or self._lines[0]["frame"][key], sent[key])
        got, wanted = _plain(sent), _plain(renamed(frame, self._ids))
        got = {key: got[key] for key in got if key in wanted or key not in {"id", "conversation"}}
        assert got == wanted, sent
        self._unanswered.append((frame, sent))

    async def _send(self, frame: Frame, client: Client) -> None:
        asked = self._asked(frame)
        if frame["type"] == "stopped" and (asked is None or "request" not in asked):
            return  # the client does not ask for it
        sent = {**renamed(frame, self._ids), **({"message": "m"} if "message" in frame else {})}
        sent = {key: value for key, value in sent.items() if key != "request"}
        await self._connection.send(json.dumps(sent if asked is None else _answering(asked, sent)))
        name = str(frame.get("id", frame.get("about")))
        shown = self._shown.get(name)
        if self._request is not None and asked is not None and frame["type"] in ANSWERED:
            answer, self._request = await self._request, None
            if frame["type"] == "history":
                told = [[m["role"], m["content"], m.get("partial")] for m in frame["messages"]]
                assert answer == {"title": frame["title"], "messages": told}
            elif frame["type"] == "conversations":
                assert answer == [[item["id"], item["title"]] for item in sent["items"]]
            else:
                assert answer == {}
        elif shown is not None:
            # A refusal after which the client repeats the request does not end the reply.
            refused = frame["type"] == "error" and "id" not in frame
            again = any(line.get("frame", {}).get("id") == name for line in self._lines)
            if not (refused and (again or frame["code"] == Code.NOT_RUNNING)):
                shown.take(frame)
            while not shown.fits(await client.seen(shown.name)):  # noqa: ASYNC110
                await asyncio.sleep(0)
        elif frame["type"] == "start":  # a prompt of another socket
            self._shown[frame["id"]] = shown = _Shown(frame["id"])
            shown.take(frame)

    def _asked(self, frame: Frame) -> Frame | None:
        """Return the client's frame that the vector's frame answers."""
        kind, about = frame["type"], frame.get("about")
        if "prompt" in frame or (kind == "error" and "id" in frame):
            return None
        for asked, sent in self._unanswered:
            of = asked.get("type", "prompt")
            if kind == "error":
                stop = frame["code"] == Code.NOT_RUNNING
                fits = about in {asked.get("id"), asked.get("conversation")} and stop is (
                    of == "stop"
                )
            elif kind == "stopped":
                fits = of == "stop" and asked["id"] in frame["ids"]
            elif kind == "start":
                fits = ANSWERS[of] == kind and asked.get("id", frame["id"]) == frame["id"]
            else:
                fits = ANSWERS[of] == kind and asked.get("conversation") == frame.get(
                    "conversation"
                )
            if fits:
                self._unanswered.remove((asked, sent))
                return sent
        return None


def _plain(frame: Frame) -> Frame:
    """Return a client's frame without defaults, and without keys that may differ."""
    sent = parse(json.dumps(frame)).model_dump(exclude_none=True, exclude={"request", "token"})
    return {key: value for key, value in sent.items() if value != DEFAULTS.get(key)}


def _answering(asked: Frame, frame: Frame) -> Frame:
    return {**frame, **({"request": asked["request"]} if "request" in asked else {})}
