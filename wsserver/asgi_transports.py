"""The transports of :mod:`wsserver.asgi_app`: a WebSocket, and the body of a streamed response."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from wsserver.admission import Visitor
from wsserver.app import App
from wsserver.connections.connection import Connection
from wsserver.limits import Memory
from wsserver.logs import log
from wsserver.protocol import Close
from wsserver.responses import Stream

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class Held:
    """Counts the bytes that one connection holds; see :class:`wsserver.limits.Memory`."""

    def __init__(self, memory: Memory, visitor: Visitor) -> None:
        self._memory = memory
        self._visitor = visitor
        self._account = visitor.account
        self._size = 0

    def hold(self, size: int) -> bool:
        """Count the bytes that are held now.

        Returns:
            False where the account has no memory left. The count is then as before.
        """
        if not self._size:
            self._account = self._visitor.account
        more = size - self._size
        if not self._memory.acquire(self._account, more):
            return False
        self._memory.release(self._account, -more)
        self._size = size
        return True


@dataclass(frozen=True, slots=True)
class Call:
    """One connection: what the server of ASGI calls the application with."""

    app: App
    visitor: Visitor
    held: Held
    receive: Receive
    send: Send


class _Pump:
    """Sends events in order. ``send`` of ASGI waits until the server has room for more.

    Attributes:
        closed: no event is sent any more.
    """

    def __init__(self, call: Call) -> None:
        self._settings = call.app.settings
        self._metrics = call.app.metrics
        self._held = call.held
        self._send = call.send
        self._events: deque[Event] = deque()
        self._size = 0  # bytes of the events
        self._loop = asyncio.get_running_loop()
        self._sending: float | None = None  # since when the server takes an event
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: asyncio.Timeout
        self._more = asyncio.Event()
        self._ended = False
        self.closed = False

    @property
    def writable(self) -> bool:
        """Whether all events are sent."""
        return not (self._events or self._ended or self.closed)

    def put(self, event: Event, size: int = 0, *, last: bool = False) -> None:
        """Send an event of so many bytes after the events before it."""
        if self._ended or self.closed:
            return
        self._events.append(event)
        self._size += size
        self._ended = last
        # Nearly every event is sent at once: few bytes are not counted.
        many = self._size > self._settings.write_buffer
        if self._size > self._settings.max_unsent or (many and not self._held.hold(self._size)):
            self._metrics.reader_aborted("too much unsent")
            self.close()
        self._more.set()

    def close(self) -> None:
        """Send nothing more."""
        self.closed = True
        self._events.clear()
        self._held.hold(0)
        self._more.set()

    async def run(self, wake: Callable[[], None]) -> None:
        """Send events until the last one, or until the pump is closed.

        Args:
            wake: called whenever all events are sent.
        """
        try:
            async with asyncio.timeout(None) as self._timeout:
                await self._send_all(wake)
        except TimeoutError:
            self._metrics.reader_aborted("does not read")
        except OSError:  # the client has gone
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.close()

    async def _send_all(self, wake: Callable[[], None]) -> None:
        while not self.closed:
            while self._events:
                self._sending = self._loop.time()
                if self._timer is None:
                    self._check_later(self._settings.send_timeout)
                await self._send(self._events.popleft())
            self._sending = None
            if self._size > self._settings.write_buffer:
                self._held.hold(0)
            self._size = 0
            if self._ended:
                return
            wake()
            self._more.clear()
            if not (self._events or self.closed):
                await self._more.wait()

    def _check_later(self, seconds: float) -> None:
        """Set the timer that serves many events: a timer for each would cost more than to send."""
        self._timer = self._loop.call_later(seconds, self._check)

    def _check(self) -> None:
        """Abort a client whose server has not taken an event within the `send_timeout`."""
        self._timer = None
        if self._sending is not None:
            now = self._loop.time()
            left = self._sending + self._settings.send_timeout - now
            if left > 0:
                self._check_later(left)
            else:
                self._timeout.reschedule(now)


class SocketTransport:
    """A WebSocket as the transport of a client; see :class:`wsserver.app.ClientTransport`."""

    def __init__(self, call: Call, subprotocol: str | None) -> None:
        self.id = uuid4()
        self.began = asyncio.get_running_loop().time()
        self.subprotocol = subprotocol
        self.closed_by_client = False
        self.ended_with: int = 1006
        self._app = call.app
        self._visitor = call.visitor
        self._receive = call.receive
        self._pump = _Pump(call)
        self._ending = False
        self._closed = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether neither side has begun to close it."""
        return not (self._ending or self._pump.closed)

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._pump.writable

    def write(self, frame: bytes) -> None:
        """Send a frame."""
        self._pump.put({"type": "websocket.send", "text": frame.decode()}, len(frame))

    def end(self, code: int, reason: str = "") -> None:
        """Close the WebSocket, after what was written before."""
        if self.open:
            self._ending = True
            self.ended_with = code
            event = {"type": "websocket.close", "code": int(code), "reason": reason}
            self._pump.put(event, last=True)

    async def wait_closed(self) -> None:
        """Wait until the WebSocket is closed."""
        await self._closed.wait()

    async def serve(self) -> None:
        """Serve the client until it has gone."""
        connection = self._app.opened(self, self._visitor)
        sending = asyncio.create_task(self._pump.run(connection.wake))
        reading = asyncio.create_task(self._read(connection))
        try:
            await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
            if self._ending and not reading.done():  # the close frame is answered
                await asyncio.wait({reading}, timeout=self._app.settings.send_timeout)
        finally:
            for task in (sending, reading):
                task.cancel()
            await asyncio.gather(sending, reading, return_exceptions=True)
            self._pump.close()
            self._app.closed(self, self._visitor)
            self._closed.set()

    async def _read(self, connection: Connection) -> None:
        size = self._app.settings.message_size
        while True:
            event = await self._receive()
            if event["type"] == "websocket.disconnect":
                code = event.get("code", 1005)
                if not self._ending:
                    self.ended_with = code
                self.closed_by_client = code != 1006  # noqa: PLR2004 - no close frame came
                return
            text: str | None = event.get("text")
            message: str | bytes = event["bytes"] if text is None else text
            if len(message if text is None else text.encode()) > size:
                self.end(Close.MESSAGE_TOO_BIG, "too big")
                continue
            try:
                connection.receive(message)
            except Exception as error:  # noqa: BLE001
                log.error("connection failed", socket=self.id, failure=error)
                self.end(Close.INTERNAL_ERROR)


class Body:
    """The body of a streamed response; see :class:`wsserver.responses.BodyWriter`."""

    def __init__(self, call: Call, answer: Stream) -> None:
        self.id = uuid4()
        self._answer = answer
        self._receive = call.receive
        self._pump = _Pump(call)

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._pump.writable

    def write(self, data: bytes) -> None:
        """Write a part of the body."""
        event = {"type": "http.response.body", "body": data, "more_body": True}
        self._pump.put(event, len(data))

    def end(self) -> None:
        """End the body."""
        self._pump.put({"type": "http.response.body", "body": b"", "more_body": False}, last=True)

    def abort(self) -> None:
        """End the connection without the end of the body: servers cut a response that has none."""
        self._pump.close()

    async def serve(self) -> None:
        """Serve the client until the body has ended, or the client has gone."""
        producer = self._answer.producer
        self._pump.put(start_event(self._answer.status, self._answer.headers))
        sending = asyncio.create_task(self._pump.run(producer.wake))
        watching = asyncio.create_task(self._watch())
        try:
            producer.open(self)
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            self._pump.close()
            producer.closed()

    async def _watch(self) -> None:
        """Wait until the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def start_event(status: HTTPStatus, headers: Mapping[str, str], prefix: str = "") -> Event:
    """Return the event with the status and the headers of a response."""
    return {
        "type": f"{prefix}http.response.start",
        "status": int(status),
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in headers.items()
        ],
    }
