"""A fast fake of Anthropic's streaming Messages API, for benchmarks.

``python -m tests.bench.upstream`` prints its URL and serves until stdin closes. It sends the events
of the real API, each in one HTTP chunk. It never fails; `tests/support/upstream.py` is the fake
with faults.

``POST /plan`` sets how the next ``POST /v1/messages`` are answered, and resets the counts:
    ``{"tokens": 0, "rate": 50, "ahead": 0, "numbered": false}``. A reply begins with `ahead`
    tokens, as fast as the socket accepts them. Then it has `tokens` more (0: no end), `rate` per
    second (0: as fast as the socket accepts them). The first paced token is sent at once. The times
    of the others are spread evenly among the streams. With `numbered`, the text of a paced token
    has the number of the token in its reply, from 0, instead of the time.

``GET /stats`` returns ``open`` (running streams), ``requests``, ``tokens`` (written so far) and
    ``closes``: the time at which the peer closed each unfinished stream. The key is N of the ``#N``
    in the prompt.

``GET /writes`` returns the times at which the tokens of `numbered` streams were written. The key is
    the same N.

The text of a paced token is ``@MICROSECONDS word``: the time of its write by the monotonic clock,
which all processes of a machine share. The text of any other token is ``@word``. So a client counts
tokens by ``@``, merged or not.
"""

import contextlib
import heapq
import json
import re
import resource
import select
import socket
import sys
from time import monotonic

MODEL = re.compile(rb'"model"\s*:\s*"([^"]*)"')
NUMBER = re.compile(rb"#(\d+)")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
BLOCK = 256  # tokens per write in a reply without a rate
GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly


def event(kind: str, **fields: object) -> bytes:
    """Return a server-sent event as one HTTP chunk."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"))
    body = f"event: {kind}\ndata: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(body), body)


def token(text: str) -> bytes:
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nrequest-id: req_%06d\r\ntransfer-encoding: chunked\r\n\r\n"
)
USAGE = {"input_tokens": 25, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
MESSAGE: dict[str, object] = {"id": "msg_000001", "type": "message", "role": "assistant"}
MESSAGE |= {"content": [], "stop_reason": None, "stop_sequence": None}
OPENING = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
OPENING += event("ping")
STAMP = "@000000000000 "
STAMPED = token(f"{STAMP}word ").replace(STAMP.encode(), b"@%012d ")
PLAIN = token("@word ")


def start(model: str) -> bytes:
    message = MESSAGE | {"model": model, "usage": USAGE | {"output_tokens": 1}}
    return event("message_start", message=message) + OPENING


def end(tokens: int) -> bytes:
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    last = event("message_delta", delta=stop, usage=USAGE | {"output_tokens": tokens})
    return event("content_block_stop", index=0) + last + event("message_stop") + b"0\r\n\r\n"


class Connection:
    """A client's connection, with at most one stream at a time."""

    __slots__ = ("busy", "fd", "left", "number", "received", "sent", "sock", "unsent", "watched")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.received = b""
        self.unsent = memoryview(b"")
        self.watched = False  # whether epoll reports when the socket is writable
        self.busy = 0  # serial number of the running request; 0 without one
        self.number = 0
        self.sent = 0
        self.left = 0  # tokens to write without a rate; -1 for no end


class Upstream:
    """The server: one loop around epoll."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.epoll = select.epoll()
        self.connections: dict[int, Connection] = {}
        self.due: list[tuple[float, int, Connection]] = []
        self.block = memoryview(PLAIN * BLOCK)
        self.serial = 0
        self.plan(tokens=100)

    def plan(
        self, tokens: int = 0, rate: float = 0.0, ahead: int = 0, *, numbered: bool = False
    ) -> None:
        self.endless = tokens == 0
        self.ahead = ahead if rate else ahead + tokens
        self.paced = tokens if rate else 0
        self.interval = 1 / rate if rate else 0.0
        self.requests = 0
        self.written = 0
        self.closes: dict[int, float] = {}
        self.numbered = numbered
        self.writes: dict[int, list[float]] = {}

    def serve(self) -> None:
        """Serve until stdin closes."""
        listener, stdin = self.listener.fileno(), sys.stdin.fileno()
        self.epoll.register(listener, select.EPOLLIN)
        self.epoll.register(stdin, select.EPOLLIN | select.EPOLLHUP)
        while True:
            wait = self.due[0][0] - monotonic() if self.due else None
            # The time-out of epoll has whole milliseconds; the time-out of select is exact.
            if wait is None or wait > 0:
                select.select([self.epoll], [], [], wait)
            for fd, events in self.epoll.poll(0):
                if fd == listener:
                    self.accept()
                elif fd == stdin:
                    return
                elif connection := self.connections.get(fd):
                    if events & ~select.EPOLLOUT:
                        self.readable(connection)
                    if events & select.EPOLLOUT and fd in self.connections:
                        self.writable(connection)
            now = monotonic()
            while self.due and self.due[0][0] <= now:
                self.tick(*heapq.heappop(self.due))

    def accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(sock)
                self.connections[connection.fd] = connection
                self.epoll.register(connection.fd, select.EPOLLIN)

    def drop(self, connection: Connection) -> None:
        if connection.busy:
            self.closes[connection.number] = monotonic()
            connection.busy = 0
        del self.connections[connection.fd]
        connection.sock.close()

    def readable(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(connection)
            return
        received = connection.received + data
        head = received.find(b"\r\n\r\n") + 4
        if head < 4:
            connection.received = received
            return
        length = LENGTH.search(received, 0, head)
        over = head + (int(length[1]) if length else 0)
        connection.received = received if len(received) < over else received[over:]
        if len(received) >= over:
            self.answer(connection, received[: received.find(b" ", 5)], received[head:over])

    def answer(self, connection: Connection, request: bytes, body: bytes) -> None:
        if request.startswith(b"POST /v1/messages"):
            self.begin(connection, body)
            return
        if request == b"POST /plan":
            self.plan(**json.loads(body))
        busy = sum(1 for each in self.connections.values() if each.busy)
        stats = {"open": busy, "requests": self.requests, "tokens": self.written}
        told = self.writes if request == b"GET /writes" else stats | {"closes": self.closes}
        answer = json.dumps(told).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.write(connection, head % len(answer) + answer)

    def begin(self, connection: Connection, body: bytes) -> None:
        self.serial += 1
        self.requests += 1
        number = NUMBER.findall(body)
        model = MODEL.search(body)
        connection.busy = self.serial
        connection.number = int(number[-1]) if number else -self.serial
        connection.sent = 0
        connection.left = self.ahead or -self.endless * (not self.interval)
        opening = HEAD % self.serial + start(model[1].decode() if model else "")
        if connection.left:
            self.write(connection, opening)
            self.watch(connection, on=True)
        else:
            self.pace(connection, opening)

    def pace(self, connection: Connection, opening: bytes = b"") -> None:
        """Write the first paced token, and schedule the next one."""
        now = monotonic()
        self.write(connection, opening + self.next_token(connection, now))
        phase = connection.busy * GOLDEN % 1 * self.interval
        due = now - now % self.interval + phase
        due += self.interval * (due <= now)
        heapq.heappush(self.due, (due, connection.busy, connection))

    def next_token(self, connection: Connection, now: float) -> bytes:
        """Count a paced token, and return its event."""
        stamp = int(now * 1e6)
        if self.numbered:
            stamp = connection.sent
            self.writes.setdefault(connection.number, []).append(now)
        self.written += 1
        connection.sent += 1
        return STAMPED % stamp

    def tick(self, due: float, busy: int, connection: Connection) -> None:
        if connection.busy != busy:
            return  # the stream was closed
        if self.paced and connection.sent >= self.ahead + self.paced:
            self.finish(connection)
            return
        if not connection.unsent:  # a peer that does not read gets no further token
            self.write(connection, self.next_token(connection, monotonic()))
        heapq.heappush(self.due, (due + self.interval, busy, connection))

    def finish(self, connection: Connection) -> None:
        connection.busy = 0
        self.write(connection, end(connection.sent))

    def write(self, connection: Connection, data: bytes | memoryview) -> None:
        if connection.unsent:
            connection.unsent = memoryview(bytes(connection.unsent) + data)
            return
        try:
            sent = connection.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the next read reports the error
        if sent < len(data):
            connection.unsent = memoryview(data)[sent:]
            self.watch(connection, on=True)

    def watch(self, connection: Connection, *, on: bool) -> None:
        if connection.watched != on:
            connection.watched = on
            events = select.EPOLLIN | select.EPOLLOUT * on
            self.epoll.modify(connection.fd, events)

    def writable(self, connection: Connection) -> None:
        if unsent := connection.unsent:
            connection.unsent = unsent[:0]
            self.write(connection, unsent)
        elif connection.busy and connection.left:
            # -1 stands for no end and never changes.
            count = BLOCK if connection.left < 0 else min(BLOCK, connection.left)
            connection.left -= count if connection.left > 0 else 0
            connection.sent += count
            self.written += count
            self.write(connection, self.block[: count * len(PLAIN)])
        elif connection.busy and self.interval and connection.sent == self.ahead:
            self.watch(connection, on=False)
            self.pace(connection)
        elif connection.busy and not self.interval:
            self.watch(connection, on=False)
            self.finish(connection)
        else:
            self.watch(connection, on=False)


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    upstream = Upstream()
    print(f"http://127.0.0.1:{upstream.listener.getsockname()[1]}", flush=True)
    upstream.serve()


if __name__ == "__main__":
    main()
