"""One WebSocket connection: sends requests, and matches the answers to them.

A server that sends ``hello`` repeats the ``request`` key of a frame in its answer. An older server
does not. Its answer then belongs to the oldest request that it fits.
"""

import asyncio
import contextlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from websockets.exceptions import ConnectionClosed

from wsserver.client.dial import FINAL_CLOSE_CODES, Socket
from wsserver.client.failures import ConnectionFailed, parse_seconds
from wsserver.client.history import Limits
from wsserver.errors import Code
from wsserver.protocol import (
    ANSWERS,
    ClientFrame,
    Close,
    Prompt,
    Resume,
    Stop,
)
from wsserver.wire import text_of

MAX_UNANSWERED = 8  # requests; fewer than the `bad_frames` after which a server closes
CLOCK_MARGIN = 1.05  # factor on `retry_after`, since the server's clock may run faster
SILENCE_WHILE_WAITING = 4.0  # seconds without data before a ping and after it, with a request open
SLOWEST_UPLOAD = 16384  # bytes per second; a large frame may delay the answer for longer
MESSAGES_PER_TURN = 16  # messages read before other tasks run


@dataclass(eq=False, slots=True)
class Request:
    """A frame that the server has to answer. It can be sent on several connections in turn."""

    # Returns the frame; called each time that the request is sent.
    make_frame: Callable[[], ClientFrame]
    # Called with the answer, or with the `error` that refuses the request.
    on_answer: Callable[[Mapping[str, Any]], None]
    times_sent: int = 0  # how often it was sent


@dataclass(eq=False, slots=True)
class _Unanswered:
    """A request that was sent, with its frame and the frame's size in bytes."""

    request: Request
    frame: ClientFrame
    size: int


class Link:
    """Uses one connection until it is lost.

    Args:
        socket: the connection.
        silence: seconds without data before a ping, and after it. While a request or a reply is
            pending, the limit is :data:`SILENCE_WHILE_WAITING` at most.
        reply_pending: returns whether the user waits for a reply.
        on_frame: called with ``hello``, with frames that have an ``id``, and with frames that
            answer no request.
    """

    def __init__(
        self,
        socket: Socket,
        silence: float,
        reply_pending: Callable[[], bool],
        on_frame: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.socket = socket
        self.limits: Limits | None = None  # the server's limits; None before `hello`
        self.models: tuple[str, ...] = ()  # the server's models; empty before `hello`
        self.answered = False  # whether the server sent anything but `hello` and refusals
        self.failure = ""  # why the client aborted the connection; empty if it did not
        self._silence = silence
        self._reply_pending = reply_pending
        self._on_frame = on_frame
        self._names_requests = False  # the server repeats the `request` key
        self._greeted = asyncio.Event()
        self._writable = asyncio.Event()  # a queue may have a request to send
        self._queued = asyncio.Event()  # a request was queued, so that the silence limit may change
        self._urgent: deque[Request] = deque()
        self._prompts: deque[Request] = deque()
        self._queries: deque[Request] = deque()
        self._unanswered: dict[str, _Unanswered] = {}  # by `request` key, oldest first
        self._names = map(str, itertools.count(1))
        self._window = MAX_UNANSWERED
        self._paused_until = 0.0
        self._task_error: BaseException | None = None

    # Queues: stops and `auth`; prompts and resumes; queries such as `open` and `list`.

    def send(self, request: Request) -> None:
        """Send a request before all queued ones."""
        self._queue(request, self._urgent)

    def send_prompt(self, request: Request) -> None:
        """Queue a prompt or a resume. The server's limits bound how many are unanswered at once."""
        self._queue(request, self._prompts)

    def send_query(self, request: Request) -> None:
        """Queue a query behind all prompts. An older server gets one query at a time."""
        self._queue(request, self._queries)

    def is_queued(self, request: Request) -> bool:
        """Return whether a prompt has not been sent on this connection."""
        return request in self._prompts

    def remove(self, request: Request) -> None:
        """Remove a request from its queue."""
        for queue in (self._prompts, self._queries):
            with contextlib.suppress(ValueError):
                queue.remove(request)

    def _queue(self, request: Request, queue: deque[Request]) -> None:
        queue.append(request)
        self._writable.set()
        self._queued.set()

    # Running and closing.

    async def run(self) -> None:
        """Use the connection until it is lost.

        Raises:
            ConnectionFailed: the server violates the protocol.
        """
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._write()), loop.create_task(self._abort_when_silent())]
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        try:
            await self._read()
        except ConnectionClosed as closed:
            ours = closed.sent if not closed.rcvd_then_sent else None
            if ours is not None and ours.code in FINAL_CLOSE_CODES | {Close.MESSAGE_TOO_BIG}:
                raise _protocol_broken(ours.reason or ours.code) from closed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if self._task_error is not None:
            raise self._task_error

    async def close(self, within: float) -> None:
        """Close the connection; abort it if the server does not answer within some seconds."""
        closing = asyncio.ensure_future(self.socket.close())
        await asyncio.wait({closing}, timeout=within)
        self.socket.transport.abort()
        await closing

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._task_error = error
            self.socket.transport.abort()

    async def _abort_when_silent(self) -> None:
        """Send a ping after each silence, and abort when the ping stays unanswered as well.

        A network that fails closes no connection, so the socket reports no error. Any data counts
        as an answer to the ping.
        """
        loop = asyncio.get_running_loop()
        pinged_at: float | None = None
        while True:
            seconds, last_data_at = self._silence_limit(), self.socket.last_data_at
            if pinged_at is not None and last_data_at >= pinged_at:
                pinged_at = None
            due = (last_data_at if pinged_at is None else pinged_at) + seconds
            late = loop.time() - due
            if late < 0:
                self._queued.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._queued.wait()
            # A suspended process has not read the data that arrived in between. It then
            # looks much later than `due`, and sends another ping instead of giving up.
            elif pinged_at is None or late > seconds / 2:
                pinged_at = loop.time()
                with contextlib.suppress(TimeoutError, ConnectionClosed):
                    async with asyncio.timeout(seconds):
                        await self.socket.ping()
            else:
                self.failure = f"the server sent nothing for {loop.time() - last_data_at:.1f} s"
                self.socket.transport.abort()
                return

    def _silence_limit(self) -> float:
        if not (self._unanswered or self._reply_pending()):
            return self._silence
        largest = max((sent.size for sent in self._unanswered.values()), default=0)
        return min(self._silence, SILENCE_WHILE_WAITING + largest / SLOWEST_UPLOAD)

    # Writing.

    async def _write(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            # A server that sends `hello` sends it before it answers this ping.
            pong = asyncio.ensure_future(await self.socket.ping())
            pong.add_done_callback(lambda _: self._greeted.set())
            await self._greeted.wait()
            while True:
                self._writable.clear()
                data = self._next_data()
                if data is None:
                    await self._writable.wait()
                else:
                    await self.socket.send(data, text=True)

    def _next_data(self) -> bytes | None:
        """Return the next frame that may be sent now, as bytes; None if there is none."""
        while (request := self._next_request()) is not None:
            if (data := self._encode(request)) is not None:
                return data
        return None

    def _next_request(self) -> Request | None:
        loop = asyncio.get_running_loop()
        if self._urgent:
            return self._urgent.popleft()
        if self._paused_until > loop.time():
            loop.call_at(self._paused_until, self._writable.set)
            return None
        open_frames = [s.frame for s in self._unanswered.values() if not isinstance(s.frame, Stop)]
        if len(open_frames) >= self._window:
            return None
        if self._prompts:
            return self._prompts.popleft()
        # An error of an older server does not tell which of several queries it refuses.
        query_open = any(not isinstance(frame, Prompt | Resume) for frame in open_frames)
        wait = query_open and not self._names_requests
        return self._queries.popleft() if self._queries and not wait else None

    def _encode(self, request: Request) -> bytes | None:
        """Return a request's frame as bytes. Refuse the request and return None if it is too long.

        The server would close the connection after a frame over its limit.
        """
        frame, name, limits = request.make_frame(), next(self._names), self.limits or Limits()
        if self._names_requests:
            frame = frame.model_copy(update={"request": name})
        elif isinstance(frame, Prompt):  # an older server refuses the key `retry_of`
            frame = frame.model_copy(update={"retry_of": None})
        data = frame.model_dump_json(exclude_none=True).encode()
        sizes = [("frame", len(data), limits.message_size)]
        if isinstance(frame, Prompt):
            sizes.insert(0, ("prompt", frame.size, limits.prompt_size))
        for part, size, limit in sizes:
            if limit is not None and size > limit:
                request.on_answer(
                    _too_long(f"The {part} has {size:,} bytes; {limit:,} are allowed.")
                )
                return None
        request.times_sent += 1
        if self._names_requests or not isinstance(frame, Stop):  # an older server answers no `stop`
            self._unanswered[name] = _Unanswered(request, frame, len(data))
        return data

    # Reading.

    async def _read(self) -> None:
        count = 0
        async for message in self.socket:
            try:
                frame = json.loads(message)
                if not isinstance(frame, dict):
                    raise TypeError("a frame is not an object")
                self._receive(frame)
            except (ValueError, KeyError, TypeError) as error:
                raise _protocol_broken(repr(error)) from error
            count = (count + 1) % MESSAGES_PER_TURN
            if not count:
                await asyncio.sleep(0)

    def _receive(self, frame: dict[str, Any]) -> None:
        kind, refused = frame.get("type"), is_refusal(frame)
        if kind == "hello":
            self.limits = Limits.of(frame.get("limits", {}))
            self.models = tuple(map(text_of, frame.get("models", ())))
            self._names_requests = True
            self._greeted.set()
        elif not refused:
            self.answered = True
        sent = self._unanswered.pop(self._find_request(frame) or "", None)
        if refused and frame["code"] == Code.LIMIT:
            self._slow_down(parse_seconds(frame.get("retry_after")))
        elif kind == "start":
            self._window = min(self._max_window, self._window + 1)
        if sent is not None:
            sent.request.on_answer(frame)
            self._writable.set()
        if sent is None or frame.get("id") is not None:
            self._on_frame(frame)

    def _find_request(self, frame: Mapping[str, Any]) -> str | None:
        """Return the key of the request that a frame answers; None if it answers none."""
        name: str | None = frame.get("request")
        if name is not None:
            return name
        # A frame with an `id` answers the request of that `id`. Any other frame without a `request`
        # answers only a request that was sent without one.
        has_id = frame.get("id") is not None
        return next(
            (
                name
                for name, sent in self._unanswered.items()
                if (has_id or sent.frame.request is None) and _fits(frame, sent.frame)
            ),
            None,
        )

    @property
    def _max_window(self) -> int:
        """Most open requests: if the server refuses all of them, it must not close."""
        limits = self.limits or Limits()
        bounds = [limits.requests, limits.bad_frames and limits.bad_frames // 2]
        return max(1, min([MAX_UNANSWERED, *(int(b) for b in bounds if b is not None)]))

    def _slow_down(self, seconds: float | None) -> None:
        """Send only urgent requests for some seconds, and fewer at once afterwards."""
        if seconds is not None:
            until = asyncio.get_running_loop().time() + seconds * CLOCK_MARGIN
            self._paused_until = max(self._paused_until, until)
            self._window = max(1, len(self._unanswered) // 2)

    def refuse_longest(self) -> None:
        """Refuse the longest open request, after the server closed because of a long frame."""
        if self._unanswered:
            name = max(self._unanswered, key=lambda name: self._unanswered[name].size)
            request = self._unanswered.pop(name).request
            request.on_answer(_too_long("The server accepts no frame of this length."))


def is_refusal(frame: Mapping[str, Any]) -> bool:
    """Return whether a frame is an error about a frame of the client, and not a terminal."""
    return frame.get("type") == "error" and frame.get("id") is None


def _protocol_broken(reason: object) -> ConnectionFailed:
    return ConnectionFailed(f"the server violates the protocol: {reason}")


def _too_long(message: str) -> Mapping[str, Any]:
    return {"type": "error", "code": Code.TOO_LONG, "message": message, "retryable": False}


def _fits(frame: Mapping[str, Any], sent: ClientFrame) -> bool:
    """Return whether a frame without a ``request`` can be the answer to a frame that was sent."""
    kind, name = frame.get("type"), frame.get("id")
    if name is not None:
        is_answer = kind in {"start", "done", "error"}
        return is_answer and isinstance(sent, Prompt | Resume) and sent.id == name
    conversation = getattr(sent, "conversation", None)
    if kind != "error":
        same = frame.get("conversation") in {None, conversation}
        return kind == ANSWERS[sent.type] and same
    if frame["code"] == Code.NOT_RUNNING:
        return False
    about = frame.get("about")
    if isinstance(sent, Prompt | Resume):
        # The server refuses a frame over the rate before it reads the frame's `id`.
        return about == sent.id or (about is None and frame["code"] == Code.LIMIT)
    return about in {None, conversation}
