"""A stand-in for Anthropic's Messages API: the real wire format over HTTP/1.1, faults included.

A test says what the next requests get, in order, and asks later what became of them::

    async with Upstream() as upstream:
        upstream.play(reply("Hello ", Gate("go"), "world"), error(529, "overloaded_error"))
        ...
        received = await upstream.request(0)
        assert await received.closed() == "closed"

It sits directly on asyncio's protocols, which tell at once when a client goes away, whatever the
answer waits for. It is a process of its own for those who try things out by hand:
``python -m tests.support.upstream --pieces 500 --interval 0.02 --text "token "``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from http.client import responses
from pathlib import Path
from typing import Any, Literal, Self, cast

Ending = Literal["closed", "finished", "stopped"]
"""How an exchange ended: the peer closed early, the script was over, or the upstream stopped."""

BATCH = 256
REQUEST_ID = "{request_id}"


def event(kind: str, **fields: object) -> bytes:
    """Return one server-sent event as the API frames it, its type both its name and in its data."""
    data = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def delta(kind: str, index: int, name: str, value: str) -> bytes:
    """Return a content_block_delta, as in ``delta("text_delta", 0, "text", "Hello")``."""
    return event("content_block_delta", index=index, delta={"type": kind, name: value})


PING = event("ping")
UNKNOWN_EVENT = event("content_block_confetti", index=0, colours=["red", "green"])
GARBAGE = b"]]> this is: no event\n\0\x01\x02\n{}\n\n"
MALFORMED_JSON = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,\n\n'
INVALID_UTF8 = delta("text_delta", 0, "text", "?").replace(b"?", b"\xc3\x28\xff")


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {responses.get(status, '')}\r\n{lines}\r\n".encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _pieces(text: str | Sequence[str]) -> Sequence[str]:
    return re.findall(r"\S+\s*|\s+", text) if isinstance(text, str) else text


class Step:
    """One thing done for an answer; tests may add kinds. Nothing follows one that is the last."""

    last: bool = False

    async def play(self, wire: Connection) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Head(Step):
    """The status line and headers of a stream, which go ahead: a script may stop after them."""

    headers: Mapping[str, str] = field(default_factory=dict)

    async def play(self, wire: Connection) -> None:
        wire.chunked = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        headers |= {"request-id": wire.received.request_id, "transfer-encoding": "chunked"}
        wire.write(_head(200, {**headers, **self.headers}))


@dataclass(frozen=True)
class Answer(Step):
    """A whole response, be it an error or a proxy's page. Its ``connection: close`` is obeyed."""

    status: int
    content_type: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    last: bool = True

    async def play(self, wire: Connection) -> None:
        wire.keep_alive &= self.headers.get("connection") != "close"
        body = self.body.replace(REQUEST_ID, wire.received.request_id).encode()
        headers = {"content-type": self.content_type, "content-length": str(len(body))}
        headers["request-id"] = wire.received.request_id
        wire.write(_head(self.status, {**headers, **self.headers}) + body)


@dataclass(frozen=True)
class Start(Step):
    """The message_start event, which names the model that the request asked for."""

    usage: Mapping[str, int]

    async def play(self, wire: Connection) -> None:
        asked = wire.received.body
        message: dict[str, object] = {"id": f"msg_{wire.received.index:06d}", "type": "message"}
        message |= {"role": "assistant", "content": [], "stop_reason": None, "stop_sequence": None}
        message |= {"model": asked.get("model") if isinstance(asked, dict) else None}
        await wire.emit(event("message_start", message=message | {"usage": self.usage}))


@dataclass(frozen=True)
class Events(Step):
    """Events as they go on the wire, sound or broken, all at once or one every so many seconds."""

    events: tuple[bytes, ...]
    interval: float = 0.0
    last: bool = False

    @cached_property
    def chunks(self) -> tuple[bytes, ...]:
        """The events as HTTP chunks, made once for all the streams that play them."""
        return tuple(map(_chunk, self.events))

    async def play(self, wire: Connection) -> None:
        if wire.script.chop or wire.script.crlf:
            for number, each in enumerate(self.events):
                await asyncio.sleep(self.interval if number else 0)
                await wire.emit(each)
        elif self.interval and self.events:
            await self._pace(wire)
        else:
            for first in range(0, len(self.chunks), BATCH):
                batch = self.chunks[first : first + BATCH]
                await wire.drain()
                wire.write(b"".join(batch), len(batch))

    async def _pace(self, wire: Connection) -> None:
        """Write from timers, which spare each stream a task switch per event; late ones join."""
        loop = asyncio.get_running_loop()
        over, began, done = loop.create_future(), loop.time(), 0

        def tick() -> None:
            nonlocal done
            if over.done():  # the peer has gone
                return
            if not wire.unblocked.is_set():
                loop.call_later(self.interval, tick)
                return
            due = max(done + 1, int((loop.time() - began) / self.interval) + 1)
            batch = self.chunks[done:due]
            wire.write(b"".join(batch), len(batch))
            done = due
            if done < len(self.chunks):
                loop.call_at(began + done * self.interval, tick)
            else:
                over.set_result(None)

        tick()
        await over


@dataclass(frozen=True)
class Gate(Step):
    """Stops until the test sets ``upstream.gates[name]``, or the event given instead of a name."""

    gate: str | asyncio.Event

    async def play(self, wire: Connection) -> None:
        await (wire.upstream.gates[self.gate] if isinstance(self.gate, str) else self.gate).wait()


@dataclass(frozen=True)
class Hang(Step):
    """Stops for good, silent or with a ping every so many seconds."""

    ping_every: float | None = None

    async def play(self, wire: Connection) -> None:
        while self.ping_every is not None:
            await wire.emit(PING)
            await asyncio.sleep(self.ping_every)
        await asyncio.get_running_loop().create_future()


@dataclass(frozen=True)
class Cut(Step):
    """Closes the connection in mid-event, with a FIN and no final chunk, or with a reset."""

    reset: bool = False
    last: bool = True

    async def play(self, wire: Connection) -> None:
        if wire.chunked:
            wire.write(_chunk(b'event: content_block_delta\ndata: {"type":"content_bl'))
        await wire.drain()
        if self.reset:
            linger = struct.pack("ii", 1, 0)
            raw = wire.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            wire.transport.abort()
        else:
            wire.transport.close()


END = Events((), last=True)
"""A clean end of the body, whatever the message still lacks."""


def error_event(kind: str, message: str = "No luck") -> Events:
    """Return an error in mid-stream, after which the API ends the body."""
    return Events((event("error", error={"type": kind, "message": message}),), last=True)


def error(
    status: int,
    kind: str,
    message: str = "No luck",
    *,
    error_code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Return an HTTP error: ``error(429, "rate_limit_error", headers={"retry-after": "1"})``."""
    cause: dict[str, object] = {"type": kind, "message": message}
    if error_code is not None:
        cause["details"] = {"error_code": error_code}
    body = json.dumps({"type": "error", "error": cause, "request_id": REQUEST_ID})
    return Answer(status, "application/json", body, headers or {})


@dataclass(frozen=True)
class Script:
    """The answer to one request.

    `chop` is the number of bytes per write, wherever that cuts; `crlf` is how its lines end.
    """

    steps: tuple[Step, ...]
    chop: int = 0
    crlf: bool = False

    def after(self, *steps: Step) -> Script:
        """Return the same answer after these steps: ``reply("Hi").after(Gate("go"))``."""
        return replace(self, steps=(*steps, *self.steps))


def stream(*parts: bytes | Step, chop: int = 0, crlf: bool = False) -> Script:
    """Return a stream of just these bytes and steps, for what `reply` is too orderly to send.

    A line that does not end is ``stream(b"data: ", *[b"x" * 65536] * 1000)``.
    """
    steps = (Events((part,)) if isinstance(part, bytes) else part for part in parts)
    return Script((Head(), *steps), chop, crlf)


@dataclass(frozen=True)
class ToolUse:
    """A tool_use content block, as a part of a reply."""

    name: str
    input: Mapping[str, object]
    id: str = "toolu_000001"


def reply(
    *parts: str | Sequence[str] | bytes | ToolUse | Step,
    thinking: str | Sequence[str] = (),
    stop_reason: str = "end_turn",
    stop_sequence: str | None = None,
    stop_details: Mapping[str, object] | None = None,
    input_tokens: int = 25,
    output_tokens: int | None = None,
    cache_creation_input_tokens: int = 0,
    cache_read_input_tokens: int = 0,
    interval: float = 0.0,
    chop: int = 0,
    crlf: bool = False,
) -> Script:
    """Return a whole well-formed message, with anything else between its pieces of text.

    A string is split into words, a list of strings is taken as it is, bytes go out as they are, and
    a step happens where it stands: ``reply("one two ", Gate("go"), "three", Cut())``. `interval` is
    the seconds between pieces, each of which is an output token unless `output_tokens` is given.
    """
    message = _Message(interval)
    if thinking:
        message.open("thinking", thinking="", signature="")
        message.add("thinking_delta", "thinking", _pieces(thinking))
        message.do(Events((delta("signature_delta", 0, "signature", "EqQBCgIYAhIM1gbcDa9GJw=="),)))
    for part in parts:
        if isinstance(part, Step):
            message.do(part)
        elif isinstance(part, bytes):
            message.do(Events((part,)))
        elif isinstance(part, ToolUse):
            message.open("tool_use", id=part.id, name=part.name, input={})
            message.add("input_json_delta", "partial_json", ["", *_pieces(json.dumps(part.input))])
        elif pieces := _pieces(part):
            if message.kind != "text":
                message.open("text", text="")
            message.add("text_delta", "text", pieces)
    message.close()
    usage = {"input_tokens": input_tokens, "output_tokens": 1}
    usage |= {"cache_creation_input_tokens": cache_creation_input_tokens}
    usage |= {"cache_read_input_tokens": cache_read_input_tokens}
    total = message.pieces or 1 if output_tokens is None else output_tokens
    stop = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
    last = {**stop, "stop_details": stop_details}
    end = event("message_delta", delta=last, usage=usage | {"output_tokens": total})
    message.do(Events((end, event("message_stop"))))
    return Script((Head(), Start(usage), *message.steps), chop, crlf)


class _Message:
    """Collects the steps of a message: numbers content blocks, joins neighbouring events."""

    def __init__(self, interval: float) -> None:
        self.steps: list[Step] = []
        self.kind = ""
        self.pieces = 0
        self._interval = interval
        self._index = -1

    def do(self, step: Step) -> None:
        match self.steps, step:
            case [*_, Events(last=False) as one], Events() if one.interval == step.interval:
                self.steps[-1] = replace(step, events=one.events + step.events)
            case _:
                self.steps.append(step)

    def open(self, kind: str, **block: object) -> None:
        self.close()
        self.kind = kind
        self._index += 1
        block = {"type": kind, **block}
        start = event("content_block_start", index=self._index, content_block=block)
        self.do(Events((start,) if self._index else (start, PING)))

    def add(self, kind: str, name: str, pieces: Sequence[str]) -> None:
        self.pieces += len(pieces)
        events = tuple(delta(kind, self._index, name, piece) for piece in pieces)
        self.do(Events(events, self._interval))

    def close(self) -> None:
        if self.kind:
            self.do(Events((event("content_block_stop", index=self._index),)))
        self.kind = ""


@asynccontextmanager
async def _bounded(seconds: float, awaited: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise AssertionError(f"waited {seconds} s in vain for {awaited}") from None


@dataclass(eq=False, repr=False)
class Received:
    """A request as it came in, and what became of its answer."""

    upstream: Upstream
    index: int
    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes
    peer: object  # the client's address, the same for all requests of a connection
    sent: int = 0  # events written so far
    ending: Ending | None = None
    closed_at: float | None = None  # when the peer closed early, by time.monotonic()

    def __post_init__(self) -> None:
        self.request_id = f"req_{self.index:06d}"
        self._over = asyncio.Event()

    def __repr__(self) -> str:
        state = f"{self.ending or 'open'}, {self.sent} events sent"
        return f"<request {self.index}: {self.method} {self.path}, {state}>"

    @cached_property
    def body(self) -> Any:
        """The body as parsed JSON, or as bytes if it is none."""
        try:
            return json.loads(self.raw)
        except ValueError:
            return self.raw

    async def closed(self) -> Ending:
        """Wait until the exchange is over, and tell how it ended."""
        async with _bounded(self.upstream.timeout, f"the end of {self}"):
            await self._over.wait()
        assert self.ending is not None
        return self.ending

    def settle(self, ending: Ending) -> None:
        """Note how the exchange ended; only the first cause counts."""
        if self.ending is None:
            self.ending = ending
            self.upstream.open -= 1
            if ending == "closed":
                self.closed_at = time.monotonic()
                self.upstream.closes.append(self.closed_at)
            self._over.set()


class Connection(asyncio.Protocol):
    """A client's connection, which answers its requests one after the other."""

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
        """Do asyncio's work, because its server loses sight of connections that fail at it."""
        with suppress(OSError):
            loop = asyncio.get_running_loop()
            secure = await loop.start_tls(transport, self, tls, server_side=True)
            if secure is not None and not secure.is_closing():
                self._open(secure)

    def _open(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=1, low=0)  # what is drained has left this process
        self.transport = transport
        self.upstream.connections.add(self)
        self._next_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.connections.discard(self)
        self._abandon("closed")

    def eof_received(self) -> None:
        self._abandon("closed")

    def stop(self) -> None:
        """End the connection at once, whatever its answer is waiting for."""
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
        """Answer the next request if it is here as a whole and the one before is done with."""
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
        """Write bytes as they are, which hold so many events."""
        self.transport.write(data)
        self.received.sent += events

    async def emit(self, data: bytes) -> None:
        """Write one event in the shape that the script asks for."""
        data = data.replace(b"\n", b"\r\n") if self.script.crlf else data
        size = self.script.chop or len(data)
        for first in range(0, len(data), size):
            await asyncio.sleep(
                0
            )  # with the one in drain, gives a client in this loop time to read
            await self.drain()
            self.write(_chunk(data[first : first + size]))
        self.received.sent += 1

    async def drain(self) -> None:
        """Let others run, and wait for a client that is slower than the script."""
        await asyncio.sleep(0)
        await self.unblocked.wait()


class Upstream:
    """The server: requests get the scripts given to `play`, in order, and then the default one.

    A function from a request's body to a script may be the default. `pages` are the answers to
    requests for other paths. `timeout` bounds every wait.
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
            for _turn in range(3):  # in which a connection just accepted shows up
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
        """Queue the answers to the next requests; a lone step is a whole one: ``play(Hang())``."""
        self._scripts.extend(
            script if isinstance(script, Script) else Script((script,)) for script in scripts
        )

    async def request(self, index: int = 0) -> Received:
        """Wait for the request with that index to arrive."""
        async with _bounded(self.timeout, f"request {index} after {self.requests}"):
            while len(self.requests) <= index:
                await self._arrival.wait()
        return self.requests[index]

    def receive(self, received: Received) -> Script:
        """Take a request into the books and choose its answer."""
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
            elif (method, path) != ("POST", "/v1/messages"):
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
        """Start a task that the upstream outlives, and whose failure it reports at its end."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()):
            self._failures.append(failure)


@cache
def _self_signed() -> tuple[ssl.SSLContext, str]:
    """Return the settings of a TLS server, and the text of its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        pem, key = f"{folder}/certificate.pem", f"{folder}/key.pem"
        command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -addext"
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:api.example"
        files = ("-keyout", key, "-out", pem)
        subprocess.run((*command.split(), names, *files), check=True, capture_output=True)
        context.load_cert_chain(pem, key)
        return context, Path(pem).read_text()


def tls_server() -> ssl.SSLContext:
    """Return the settings of a TLS server that nobody trusts, unless told so."""
    return _self_signed()[0]


def certificate() -> str:
    """Return the certificate of the TLS servers of the tests, to be written to a file."""
    return _self_signed()[1]


@contextmanager
def refused_url() -> Iterator[str]:
    """Give an URL where nothing listens, on a port that nobody else can take meanwhile."""
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
