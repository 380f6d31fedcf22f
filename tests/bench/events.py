"""Clients that chat over HTTP: each prompt is a POST, its reply a stream of server-sent events."""

import json
import re
import socket
import uuid
from collections.abc import Iterator
from time import monotonic

from tests.bench.load import BOUND, STAMP, Client, Failure, Load

TYPE = re.compile(rb'\{"type": ?"([\w-]+)"')
PIECES = (b"token", b"text-delta")  # of our own events, and of the AI SDK
TERMINALS = (b"done", b"error", b"finish")


class Events:
    """Parses the responses of one connection into the data of whole events."""

    __slots__ = ("_in_body", "_rest", "_text")

    def __init__(self) -> None:
        self._rest = b""
        self._in_body = False
        self._text = b""  # of the body, after the last whole event

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the data of each event that the bytes complete.

        Raises:
            Failure: a response is no stream of events in chunks.
        """
        if self._rest:
            data = self._rest + data
        at = 0
        while True:
            mark = b"\r\n" if self._in_body else b"\r\n\r\n"
            end = data.find(mark, at)
            if end < 0:
                break
            if not self._in_body:
                head = data[at:end].lower()
                if b" 200 " not in head[:20] or b"transfer-encoding: chunked" not in head:
                    raise Failure(f"the server answered {data[at : at + 300]!r}")
                self._in_body, at = True, end + 4
                continue
            size = int(data[at:end], 16)
            over = end + 4 + size
            if over > len(data):
                break
            self._in_body = size > 0
            self._text += data[end + 2 : over - 2]
            at = over
        self._rest = data[at:]
        *events, self._text = self._text.split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield line[6:]


class EventClient(Client):
    """One connection. To stop its reply, the client aborts the request."""

    def __init__(self, sock: socket.socket, number: int, load: "EventLoad") -> None:
        super().__init__(sock, number)
        self.load = load
        self.events = Events()
        self.opened = True

    def prompt(self, text: str) -> None:
        """Send a prompt on the same connection as the prompts before it."""
        self.clear()
        self.asked_at = monotonic()
        self.send(self.load.request("POST", "", self.body(text)))

    def body(self, text: str) -> object:
        return {"prompt": text}

    def stop(self) -> None:
        self.stopped_at = self.over_at = monotonic()
        self.load.close([self])


class AiSdkClient(EventClient):
    """The same as ``useChat``: it stops its chat by a request."""

    def __init__(self, sock: socket.socket, number: int, load: "EventLoad") -> None:
        super().__init__(sock, number, load)
        self.chat = uuid.uuid4().hex

    def body(self, text: str) -> object:
        message = {"id": text, "role": "user", "parts": [{"type": "text", "text": text}]}
        return {"id": self.chat, "trigger": "submit-message", "messages": [message]}

    def stop(self) -> None:
        with socket.create_connection((self.load.host, self.load.port), BOUND) as sock:
            self.stopped_at = monotonic()
            sock.sendall(self.load.request("POST", f"/{self.chat}/stop", {}))
            if b" 200 " not in sock.recv(4096)[:20]:
                raise Failure("the stop was refused")


class EventLoad(Load):
    """All clients of one server; see :class:`Load`.

    Args:
        url: the address below which the server has ``/api/chat``.
        ai_sdk: speak as ``useChat`` does.
    """

    schemes = ("http",)
    idles = False  # a connection without a request is closed after seconds

    def __init__(self, url: str, *, ai_sdk: bool = False) -> None:
        super().__init__(url, stamps=True)
        self.kind = AiSdkClient if ai_sdk else EventClient

    def request(self, method: str, path: str, body: object) -> bytes:
        content = json.dumps(body).encode()
        lines = [
            f"{method} {self.path.rstrip('/')}/api/chat{path} HTTP/1.1",
            f"Host: {self.name}",
            "Connection: keep-alive",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + content

    def open(self, prompt: str = "") -> Client:
        client = self.kind(*self.dial(), self)
        self.add(client)
        if prompt:
            client.prompt(prompt)
        return client

    def receive(self, client: Client, data: bytes) -> None:
        assert isinstance(client, EventClient)
        if not data and client.running:
            raise Failure("the server closed a connection during a reply")
        if not data:  # the connection was idle for seconds
            self.close([client])
            return
        now = monotonic()
        for payload in client.events.feed(data):
            self.event(client, payload, now)

    def event(self, client: Client, payload: bytes, now: float) -> None:
        self.frames += 1
        match = TYPE.match(payload)
        if match is None:  # `[DONE]`
            return
        if match[1] in PIECES:
            self.count(client, payload.count(b"@"), now)
            if self.latencies is not None:
                self.latencies += [now - int(at) / 1e6 for at in STAMP.findall(payload)]
        elif match[1] in TERMINALS:
            client.over_at = now
            client.terminal = payload
            self.on_over(client)
