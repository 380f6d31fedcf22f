"""Many clients in one process. They send prompts, count tokens, and stop replies.

::

    python -m tests.bench.load ws://localhost:3001/ --streams 100 --seconds 10

This works with every server that accepts ``{"prompt": …}`` and ``{"type": "stop"}``, and answers
with ``token`` frames and a terminal, ``done`` or ``error``. The clients use raw sockets and a small
WebSocket implementation (RFC 6455), to leave the CPU to the server.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import re
import resource
import select
import socket
import ssl
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from time import monotonic, process_time
from typing import Any, Self
from urllib.parse import urlsplit

BOUND = 30.0  # seconds for any wait
READ = 262144  # bytes per read
BATCH = 100  # concurrent handshakes
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TYPE = re.compile(rb'\{"type": ?"(\w+)"')
SEQ = re.compile(rb'"seq": ?(\d+)')
STAMP = re.compile(rb"@(\d+)")


class Failure(Exception):
    """The server ended, or did not do in time what the benchmark waited for."""


def masked(opcode: int, payload: bytes) -> bytes:
    """Return a masked frame of a client."""
    size = len(payload)
    if size < 126:
        head = bytes((128 | opcode, 128 | size))
    elif size < 65536:
        head = bytes((128 | opcode, 128 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((128 | opcode, 128 | 127)) + size.to_bytes(8, "big")
    mask = os.urandom(4)
    cover = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ cover).to_bytes(size, "big")


class Frames:
    """Parses the bytes of a server into whole messages and control frames."""

    __slots__ = ("_opcode", "_parts", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._opcode = 0
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield opcode and payload of each message that the data completes.

        Raises:
            Failure: a frame violates RFC 6455, or uses an extension that was not negotiated.
        """
        if self._rest:
            data = self._rest + data
        at, size = 0, len(data)
        while size - at >= 2:
            first, length = data[at], data[at + 1]
            body = at + 2
            if length >= 126:
                if length > 127:
                    raise Failure("a frame of the server has a mask")
                body += 2 if length == 126 else 8
                if body > size:
                    break
                length = int.from_bytes(data[at + 2 : body], "big")
            over = body + length
            if over > size:
                break
            payload = data[body:over]
            at = over
            if first == 128 | TEXT and not self._parts:
                yield TEXT, payload
                continue
            opcode = first & 15
            if first & 112:
                raise Failure("a frame of the server uses an extension that was not negotiated")
            if opcode >= 8:
                yield opcode, payload
                continue
            if bool(opcode) == bool(self._parts):
                raise Failure("fragments of the server are out of order")
            self._opcode = opcode or self._opcode
            self._parts.append(payload)
            if first & 128:
                whole = b"".join(self._parts)
                self._parts.clear()
                yield self._opcode, whole
        self._rest = data[at:]


class Client:
    """One socket, and the state of its newest prompt."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self.frames = Frames()
        self.key = base64.b64encode(os.urandom(16))
        self.answer = b""  # response to the handshake so far
        self.opened = False
        self.waiting = ""  # prompt to send when the connection is open
        self.clear()

    def clear(self) -> None:
        self.asked_at = 0.0
        self.first_at = 0.0
        self.stopped_at = 0.0
        self.over_at = 0.0
        self.tokens = 0
        self.terminal = b""

    def send(self, frame: bytes) -> None:
        if self.sock.send(frame) != len(frame):
            raise Failure("the server does not read")

    def prompt(self, text: str) -> None:
        """Send a prompt, now or when the connection is open."""
        self.clear()
        if not self.opened:
            self.waiting = text
            return
        self.asked_at = monotonic()
        self.send(masked(TEXT, json.dumps({"prompt": text}).encode()))

    def stop(self) -> None:
        self.stopped_at = monotonic()
        self.send(masked(TEXT, b'{"type":"stop"}'))

    @property
    def failed(self) -> bool:
        return b'"error"' in self.terminal[:40]

    @property
    def running(self) -> bool:
        return not self.over_at and self.asked_at > 0


class Load:
    """All clients of one server, and their event loop.

    With `stamps`, tokens are counted by the ``@`` that this benchmark's upstream puts into the text
    of each token. While `latencies` is a list, the seconds from the stamp of each token until its
    arrival are appended to it. Without `stamps`, tokens are counted by `seq`; if frames have no
    `seq`, each frame counts as one token.

    `on_over` is called with each client whose reply has ended.
    """

    schemes: Sequence[str] = ("ws", "wss")
    idles = True  # connections may be idle

    def __init__(self, url: str, *, token: str = "", stamps: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in self.schemes or not parts.hostname:
            raise Failure(f"{url} is not a {':// or '.join(self.schemes)}:// address")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "wss" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "wss" else None
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.name = parts.netloc.rpartition("@")[2]
        self.token = token
        self.stamps = stamps
        self.epoll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.latencies: list[float] | None = None
        self.on_over: Callable[[Client], None] = lambda client: None
        self.tokens = 0
        self.frames = 0
        self.bytes = 0  # received
        self.serial = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.epoll.close()

    def dial(self) -> tuple[socket.socket, int]:
        """Connect; return the socket and the number of the client."""
        sock = socket.create_connection((self.host, self.port), BOUND)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            sock = self.tls.wrap_socket(sock, server_hostname=self.host)
        self.serial += 1
        return sock, self.serial

    def add(self, client: Client) -> None:
        """Read what the server sends to a client from now on."""
        client.sock.setblocking(False)
        self.clients[client.sock.fileno()] = client
        self.epoll.register(client.sock.fileno(), select.EPOLLIN)

    def open(self, prompt: str = "") -> Client:
        """Connect and send the handshake; :meth:`run` reads the response."""
        client = Client(*self.dial())
        client.waiting = prompt
        lines = [f"GET {self.path} HTTP/1.1", f"Host: {self.name}", "Connection: Upgrade"]
        lines += ["Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        lines += [f"Sec-WebSocket-Key: {client.key.decode()}"]
        lines += [f"Authorization: Bearer {self.token}"] if self.token else []
        client.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        self.add(client)
        return client

    def connect(self, count: int) -> list[Client]:
        """Open `count` connections, and wait for their handshakes."""
        clients: list[Client] = []
        while len(clients) < count:
            batch = [self.open() for _ in range(min(BATCH, count - len(clients)))]
            clients += batch
            self.until(lambda: all(c.opened for c in batch), "WebSocket handshakes")  # noqa: B023
        return clients

    def close(self, clients: Sequence[Client] = ()) -> None:
        """Close some connections; all if none is given."""
        for client in clients or tuple(self.clients.values()):
            if self.clients.pop(client.sock.fileno(), None):
                with contextlib.suppress(OSError):
                    client.sock.send(masked(CLOSE, (1000).to_bytes(2, "big")))
                client.sock.close()

    def run(self, seconds: float) -> None:
        """Read for some seconds."""
        end = monotonic() + seconds
        while (left := end - monotonic()) > 0:
            self.read(left)

    def until(self, condition: Callable[[], bool], awaited: str) -> None:
        """Read until the condition is true.

        Raises:
            Failure: it is still false after :data:`BOUND` seconds.
        """
        end = monotonic() + BOUND
        while not condition():
            if monotonic() > end:
                raise Failure(f"waited {BOUND:.0f} s in vain for {awaited}")
            self.read(0.05)

    def read(self, seconds: float) -> None:
        """Read all data that is there, or that arrives within some seconds."""
        for fd, _ in self.epoll.poll(seconds):
            if not (client := self.clients.get(fd)):
                continue
            while True:
                try:
                    data = client.sock.recv(READ)
                except (BlockingIOError, ssl.SSLWantReadError):
                    break
                except OSError as error:
                    raise Failure(f"the server reset a connection: {error}") from error
                self.bytes += len(data)
                self.receive(client, data)
                if client.sock.fileno() < 0:
                    break
                if not (isinstance(client.sock, ssl.SSLSocket) and client.sock.pending()):
                    break

    def receive(self, client: Client, data: bytes) -> None:
        if not data:
            raise Failure(f"the server closed a connection after {client.answer[:200]!r}")
        if not client.opened:
            data = self.upgrade(client, data)
            if not client.opened:
                return
        now = monotonic()
        for opcode, payload in client.frames.feed(data):
            if opcode == TEXT:
                self.frame(client, payload, now)
            elif opcode == PING:
                client.send(masked(PONG, payload))
            elif opcode == CLOSE:
                raise Failure(f"the server closed a connection: {payload[:200]!r}")

    def upgrade(self, client: Client, data: bytes) -> bytes:
        """Parse the response to the handshake, and return the bytes after it."""
        head, end, rest = (client.answer + data).partition(b"\r\n\r\n")
        if not end:
            client.answer = head
            return b""
        accept = base64.b64encode(hashlib.sha1(client.key + GUID).digest())
        if not head.startswith(b"HTTP/1.1 101 ") or accept not in head:
            raise Failure(
                f"the server refused the handshake: {head.splitlines()[0].decode(errors='replace')}"
            )
        client.opened = True
        client.answer = b""
        if client.waiting:
            client.prompt(client.waiting)
        return rest

    def frame(self, client: Client, payload: bytes, now: float) -> None:
        self.frames += 1
        match = TYPE.match(payload)
        kind = match[1] if match else str(json.loads(payload).get("type")).encode()
        if kind == b"token":
            if self.stamps:
                tokens = payload.count(b"@")
                if self.latencies is not None:
                    self.latencies += [now - int(at) / 1e6 for at in STAMP.findall(payload)]
            else:
                seq = SEQ.search(payload)
                tokens = int(seq[1]) - client.tokens if seq else 1
            self.count(client, tokens, now)
        elif kind in {b"done", b"error"} and b'"not_running"' not in payload:
            # `not_running` is the answer to a stop that crossed the terminal.
            client.over_at = now
            client.terminal = payload
            self.on_over(client)

    def count(self, client: Client, tokens: int, now: float) -> None:
        """Count the tokens of one frame."""
        if not client.first_at:
            client.first_at = now
        client.tokens += tokens
        self.tokens += tokens


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed; nan if there are no values."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def raise_limit() -> None:
    """Raise the limit of file descriptors of this process and its children to the hard limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


EPILOG = """\
figures:
  tokens/s       counted by `seq` of the token frames, which includes merged pieces; without `seq`
                 each frame counts as one token
  frames/s       WebSocket messages; fewer than tokens if the server merges pieces
  first token    time from the prompt until the first token frame; all prompts are sent at once
  stop           time from the stop until the terminal frame
  lost           streams that ended with an error; the first error is shown. These streams send no
                 further prompt. The server's limits for one address or principal apply to this
                 program too
  load           CPU use of this program; near 100 % of a core this program is the bottleneck

If a reply ends before the time is over, its socket sends another prompt. All prompts cost what the
server's model costs.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.load",
        description="Measure a chat server with many streams at once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="such as ws://localhost:3001/ or wss://chat.example.com/ws")
    parser.add_argument(
        "--streams", type=int, default=100, help="number of sockets, with one reply each"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time to count, after the first tokens"
    )
    parser.add_argument(
        "--token",
        default=os.environ.get("WSSERVER_CHAT_TOKEN", ""),
        help="bearer token; default: WSSERVER_CHAT_TOKEN, which other users of this machine "
        "cannot see",
    )
    parser.add_argument("--prompt", default="Tell me a long story", metavar="TEXT")
    parser.add_argument(
        "--stop-after",
        type=float,
        metavar="SECONDS",
        help="stop each reply this long after its first token, and send another prompt",
    )
    options = parser.parse_args(arguments)
    raise_limit()
    try:
        report(measure(options))
    except (Failure, OSError) as error:
        sys.exit(f"{options.url}: {error}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the load of the options and return the figures."""
    firsts: list[float] = []
    stops: list[float] = []
    errors: list[str] = []

    def over(client: Client) -> None:
        if client.first_at:
            firsts.append(client.first_at - client.asked_at)
        if client.stopped_at:
            stops.append(client.over_at - client.stopped_at)
        if client.failed:
            errors.append(client.terminal.decode(errors="replace"))
        elif not ending:
            client.prompt(options.prompt)

    with Load(options.url, token=options.token) as load:
        ending = False
        load.on_over = over
        clients = load.connect(options.streams)
        for client in clients:
            client.prompt(options.prompt)
        load.until(lambda: all(c.first_at or c.over_at for c in clients), "first tokens")
        began, used = monotonic(), process_time()
        tokens, frames = load.tokens, load.frames
        while monotonic() < began + options.seconds and any(c.running for c in clients):
            load.read(0.01)
            if options.stop_after is not None:
                due = monotonic() - options.stop_after
                for client in clients:
                    if client.running and not client.stopped_at and 0 < client.first_at <= due:
                        client.stop()
        took = monotonic() - began
        figures = {"took": took, "tokens": load.tokens - tokens, "frames": load.frames - frames}
        figures["load"] = (process_time() - used) / took
        ending = True
        for client in clients:
            if client.running and not client.stopped_at:
                client.stop()
        load.until(lambda: not any(c.running for c in clients), "terminals after stop")
    return figures | {"firsts": firsts, "stops": stops, "errors": errors}


def report(figures: dict[str, Any]) -> None:
    """Print the figures for people."""

    def spread(name: str, values: list[float]) -> None:
        if values:
            median, last = statistics.median(values) * 1e3, quantile(values, 0.99) * 1e3
            print(f"{name:14} p50 {median:.1f} ms, p99 {last:.1f} ms ({len(values)})")

    print(f"{'tokens/s':14} {figures['tokens'] / figures['took']:,.0f}")
    print(f"{'frames/s':14} {figures['frames'] / figures['took']:,.0f}")
    spread("first token", figures["firsts"])
    spread("stop", figures["stops"])
    print(f"{'lost':14} {len(figures['errors'])}", *figures["errors"][:1], sep="  ")
    print(f"{'load':14} {figures['load']:.0%} of a core")


if __name__ == "__main__":
    main()
