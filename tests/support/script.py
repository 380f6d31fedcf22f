"""Scripts for the fake Messages API: events, faults and whole replies, as steps.

https://platform.claude.com/docs/en/build-with-claude/streaming
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.client import responses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.upstream import Connection

BATCH = 256
REQUEST_ID = "{request_id}"


def event(kind: str, **fields: object) -> bytes:
    """Return one server-sent event of the API. Its type is both its name and in its data."""
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


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _pieces(text: str | Sequence[str]) -> Sequence[str]:
    return re.findall(r"\S+\s*|\s+", text) if isinstance(text, str) else text


class Step:
    """One step of a script. Tests may add kinds of steps. ``last`` ends the script."""

    last: bool = False

    async def play(self, wire: Connection) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Head(Step):
    """The status line and headers of a stream, so that a script can stop after them."""

    headers: Mapping[str, str] = field(default_factory=dict)

    async def play(self, wire: Connection) -> None:
        wire.chunked = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        headers |= {"request-id": wire.received.request_id, "transfer-encoding": "chunked"}
        wire.write(_head(200, {**headers, **self.headers}))


@dataclass(frozen=True)
class Answer(Step):
    """A whole response, such as an error. ``connection: close`` closes the connection after it."""

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
    """The message_start event, with the model of the request."""

    usage: Mapping[str, int]

    async def play(self, wire: Connection) -> None:
        asked = wire.received.body
        message: dict[str, object] = {"id": f"msg_{wire.received.index:06d}", "type": "message"}
        message |= {"role": "assistant", "content": [], "stop_reason": None, "stop_sequence": None}
        message |= {"model": asked.get("model") if isinstance(asked, dict) else None}
        await wire.emit(event("message_start", message=message | {"usage": self.usage}))


@dataclass(frozen=True)
class Events(Step):
    """Events as bytes, valid or malformed, all at once or one in each interval."""

    events: tuple[bytes, ...]
    interval: float = 0.0
    last: bool = False

    @cached_property
    def chunks(self) -> tuple[bytes, ...]:
        """The events as HTTP chunks, encoded once for all streams."""
        return tuple(map(chunk, self.events))

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
        """Write from timers, without a task switch per event. Write late events together."""
        loop = asyncio.get_running_loop()
        over, began, done = loop.create_future(), loop.time(), 0

        def tick() -> None:
            nonlocal done
            if over.done():  # the client has disconnected
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
    """Waits until the test sets ``upstream.gates[name]``, or the given event."""

    gate: str | asyncio.Event

    async def play(self, wire: Connection) -> None:
        await (wire.upstream.gates[self.gate] if isinstance(self.gate, str) else self.gate).wait()


@dataclass(frozen=True)
class Hang(Step):
    """Never ends: sends nothing, or a ping in each interval."""

    ping_every: float | None = None

    async def play(self, wire: Connection) -> None:
        while self.ping_every is not None:
            await wire.emit(PING)
            await asyncio.sleep(self.ping_every)
        await asyncio.get_running_loop().create_future()


@dataclass(frozen=True)
class Cut(Step):
    """Closes the connection within an event: with a FIN and no final chunk, or with a RST."""

    reset: bool = False
    last: bool = True

    async def play(self, wire: Connection) -> None:
        if wire.chunked:
            wire.write(chunk(b'event: content_block_delta\ndata: {"type":"content_bl'))
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
    """Return an error event, after which the API ends the body."""
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
    """The response to one request.

    `chop` is the number of bytes per write; `crlf` ends lines with CRLF.
    """

    steps: tuple[Step, ...]
    chop: int = 0
    crlf: bool = False

    def after(self, *steps: Step) -> Script:
        """Return the script with these steps before it: ``reply("Hi").after(Gate("go"))``."""
        return replace(self, steps=(*steps, *self.steps))


def stream(*parts: bytes | Step, chop: int = 0, crlf: bool = False) -> Script:
    """Return a stream of exactly these bytes and steps, also malformed ones.

    An endless line is ``stream(b"data: ", *[b"x" * 65536] * 1000)``.
    """
    steps = (Events((part,)) if isinstance(part, bytes) else part for part in parts)
    return Script((Head(), *steps), chop, crlf)


@dataclass(frozen=True)
class ToolUse:
    """A tool_use content block of a reply."""

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
    """Return a whole message, with other steps between its pieces of text.

    A string is split into words, and each word is a piece. The strings of a list are pieces. Bytes
    are sent unchanged. A step runs at its position: ``reply("one two ", Gate("go"), "three",
    Cut())``. `interval` is the seconds between pieces. Without `output_tokens` each piece counts as
    one output token.
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
    """Collects the steps of a message: numbers content blocks, and joins adjacent events."""

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
