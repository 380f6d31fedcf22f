"""A fake of a model's API: the real wire format over HTTP/1.1, and its faults.

A test queues the responses to the next requests, and later reads how the requests ended::

    async with Upstream() as upstream:
        upstream.play(reply("Hello ", Gate("go"), "world"), error(529, "overloaded_error"))
        ...
        received = await upstream.request(0)
        assert await received.closed() == "closed"

The fake is an asyncio protocol, which notices a disconnect at once, also while a response waits. It
also runs as a process:
``python -m tests.support.upstream --pieces 500 --interval 0.02 --text "token "``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import ssl
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, cast

from tests.support.certificate import certificate, tls_server
from tests.support.script import (
    END,
    GARBAGE,
    INVALID_UTF8,
    MALFORMED_JSON,
    PING,
    UNKNOWN_EVENT,
    Answer,
    Cut,
    Events,
    Gate,
    Hang,
    Head,
    Script,
    Start,
    Step,
    ToolUse,
    chunk,
    delta,
    error,
    error_event,
    event,
    reply,
    stream,
)

__all__ = [
    "END",
    "GARBAGE",
    "INVALID_UTF8",
    "MALFORMED_JSON",
    "PING",
    "UNKNOWN_EVENT",
    "Answer",
    "Cut",
    "Events",
    "Gate",
    "Hang",
    "Head",
    "Received",
    "Script",
    "Start",
    "Step",
    "ToolUse",
    "Upstream",
    "certificate",
    "delta",
    "error",
    "error_event",
    "event",
    "refused_url",
    "reply",
    "stream",
    "tls_server",
]

Ending = Literal["closed", "finished", "stopped"]
"""How a request ended: the client closed early, the script ended, or the upstream stopped."""


@asynccontextmanager
async def _bounded(seconds: float, awaited: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise AssertionError(f"waited {seconds} s in vain for {awaited}") from None


@dataclass(eq=False, repr=False)
class Received:
    """A request, and the state of its response."""

    upstream: Upstream
    index: int
    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes
    peer: object  # the client's address, the same for all requests of a connection
    sent: int = 0  # events written so far
    ending: Ending | None = None
    closed_at: float | None = None  # when the client closed early, by time.monotonic()

    def __post_init__(self) -> None:
        self.request_id = f"req_{self.index:06d}"
        self._over = asyncio.Event()

    def __repr__(self) -> str:
        state = f"{self.ending or 'open'}, {self.sent} events sent"
        return f"<request {self.index}: {self.method} {self.path}, {state}>"

    @cached_property
    def body(self) -> Any:
        """The body as parsed JSON, or as bytes if it is not JSON."""
        try:
            return json.loads(self.raw)
        except ValueError:
            return self.raw

    async def closed(self) -> Ending:
        """Wait for the end of the request; return how it ended."""
        async with _bounded(self.upstream.timeout, f"the end of {self}"):
            await self._over.wait()
        assert self.ending is not None
        return self.ending

    def settle(self, ending: Ending) -> None:
        """Note how the request ended. Only the first call counts."""
        if self.ending is None:
            self.ending = ending
            self.upstream.open -= 1
            if ending == "closed":
                self.closed_at = time.monotonic()
                self.upstream.closes.append(self.closed_at)
            self._over.set()


class Connection(asyncio.Protocol):
    """A connection of a client. It answers requests one after the other."""

    received: Received
    script: Script
    chunked: bool
    keep_alive: bool
    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self._buffer = bytearray()
        self._answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's is not derived from it
        if self.upstream.tls is None:
            self._open(transport)
        else:
            transport.pause_reading()
            self.upstream.spawn(self._shake_hands(transport, self.upstream.tls))

    async def _shake_hands(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """Do the TLS handshake here, because asyncio's server forgets connections that fail it."""
        with suppress(OSError):
            loop = asyncio.get_running_loop()
            secure = await loop.start_tls(transport, self, tls, server_side=True)
            if secure is not None and not secure.is_closing():
                self._open(secure)

    def _open(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=1, low=0)  # drained data has left this process
        self.transport = transport
        self.upstream.connections.add(self)
        self._next_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.connections.discard(self)
        self._abandon("closed")

    def eof_received(self) -> None:
        self._abandon("closed")

    def stop(self) -> None:
        """Abort the connection at once, also while its response waits."""
        self._abandon("stopped")
        self.transport.abort()

    def _abandon(self, ending: Ending) -> None:
        if self._answering is not None:
            self.received.settle(ending)
            self._answering.cancel()

    def pause_writing(self) -> None:
        self.unblocked.clear()

    def resume_writing(self) -> None:
        self.unblocked.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next_request()

    def _next_request(self) -> None:
        """Answer the next request if it is complete and the previous response has ended."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._answering is not None or self not in self.upstream.connections:
            return
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        over = end + 4 + int(headers.get("content-length", 0))
        if len(self._buffer) < over:
            return
        raw = bytes(self._buffer[end + 4 : over])
        del self._buffer[:over]
        method, path, _ = first.split(" ", 2)
        peer = self.transport.get_extra_info("peername")
        index = len(self.upstream.requests)
        self.received = Received(self.upstream, index, method, path, headers, raw, peer)
        self.script = self.upstream.receive(self.received)
        self.chunked = False
        self.keep_alive = headers.get("connection", "").lower() != "close"
        self._answering = self.upstream.spawn(self._answer())

    async def _answer(self) -> None:
        try:
            for step in self.script.steps:
                await step.play(self)
                if step.last:
                    break
            if self.chunked and not self.transport.is_closing():
                self.write(b"0\r\n\r\n")
            await self.unblocked.wait()
            self.received.settle("finished")
        except Exception:
            self.stop()
            raise
        self._answering = None
        if self.keep_alive:
            self._next_request()
        else:
            self.transport.close()

    def write(self, data: bytes, events: int = 0) -> None:
        """Write bytes that contain a number of events."""
        self.transport.write(data)
        self.received.sent += events

    async def emit(self, data: bytes) -> None:
        """Write one event with the `chop` and `crlf` of the script."""
        data = data.replace(b"\n", b"\r\n") if self.script.crlf else data
        size = self.script.chop or len(data)
        for first in range(0, len(data), size):
            await asyncio.sleep(
                0
            )  # with the one in drain, gives a client in this loop time to read
            await self.drain()
            self.write(chunk(data[first : first + size]))
        self.received.sent += 1

    async def drain(self) -> None:
        """Let other tasks run, and wait for a client that is slower than the script."""
        await asyncio.sleep(0)
        await self.unblocked.wait()


class Upstream:
    """The server. Requests get the scripts given to `play`, in order, and then the default script.

    `default` may be a function from a request's body to a script. `pages` has the responses for
    other paths. `timeout` bounds every wait.
    """

    url: str
    _server: asyncio.Server

    def __init__(self, *, tls: bool = False, timeout: float = 5.0) -> None:
        self.tls = tls_server() if tls else None
        self.timeout = timeout
        self.default: Script | Callable[[Any], Script] = reply("Hello world")
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.pages: dict[str, Callable[[Received], Script]] = {}
        self.requests: list[Received] = []
        self.closes: list[float] = []
        self.open = 0
        self.connections: set[Connection] = set()
        self._scripts: deque[Script] = deque()
        self._arrival = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), "127.0.0.1", 0, backlog=1024
        )
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        async with _bounded(self.timeout, "the connections to end"):
            for _turn in range(3):  # a connection that was just accepted appears
                await asyncio.sleep(0)
            while self.connections or self._tasks:
                for connection in tuple(self.connections):
                    connection.stop()
                for task in self._tasks:
                    task.cancel()
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            await self._server.wait_closed()
        if self._failures:
            raise BaseExceptionGroup("a script failed", self._failures)

    def play(self, *scripts: Script | Step) -> None:
        """Queue the scripts of the next requests. A step alone is a script: ``play(Hang())``."""
        self._scripts.extend(
            script if isinstance(script, Script) else Script((script,)) for script in scripts
        )

    async def request(self, index: int = 0) -> Received:
        """Wait for a request by its index."""
        async with _bounded(self.timeout, f"request {index} after {self.requests}"):
            while len(self.requests) <= index:
                await self._arrival.wait()
        return self.requests[index]

    def receive(self, received: Received) -> Script:
        """Record a request and choose its script."""
        method, path = received.method, received.path.partition("?")[0]
        if (method, path) == ("GET", "/stats"):
            counts = {"requests": len(self.requests), "closed_early": len(self.closes)}
            stats = {"open": self.open, **counts, "closes": self.closes}
            script = Script((Answer(200, "application/json", json.dumps(stats)),))
        else:
            self.requests.append(received)
            self._arrival.set()
            self._arrival = asyncio.Event()
            if path in self.pages:
                script = self.pages[path](received)
            elif method != "POST" or path not in {"/v1/messages", "/v1/chat/completions"}:
                script = Script((error(404, "not_found_error"),))
            elif self._scripts:
                script = self._scripts.popleft()
            elif isinstance(self.default, Script):
                script = self.default
            else:
                script = self.default(received.body)
        self.open += 1
        return script

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task. The upstream waits for the task at its end, and raises its failure."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()):
            self._failures.append(failure)


@contextmanager
def refused_url() -> Iterator[str]:
    """Yield a URL whose port is bound but does not listen."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


async def _serve(default: Script) -> None:
    async with Upstream() as upstream:
        upstream.default = default
        print(upstream.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve one paced reply until stdin closes.")
    parser.add_argument("--pieces", type=int, default=500)
    parser.add_argument("--interval", type=float, default=0.02)
    parser.add_argument("--text", default="token ")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # asyncio would wait for stdin all the same
    asyncio.run(_serve(reply([options.text] * options.pieces, interval=options.interval)))
