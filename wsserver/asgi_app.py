"""An ASGI application, to be mounted in FastAPI, Starlette or another one.

The server of the parent application has the sockets; this module turns its scopes and events
(ASGI 3, specs "HTTP & WebSocket" and "Lifespan") into requests and transports of :class:`App`.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from wsserver import models
from wsserver.admission import Visitor
from wsserver.app import App
from wsserver.auth import Authenticator
from wsserver.connection import Connection
from wsserver.denials import Denied
from wsserver.errors import ConfigError
from wsserver.limits import Memory
from wsserver.logs import log
from wsserver.models.base import Model, PushModel
from wsserver.protocol import Close
from wsserver.responses import (
    BODY_RATE,
    BadRequest,
    Request,
    Response,
    Stream,
    respond,
    too_large,
    too_slow,
)
from wsserver.settings import Settings
from wsserver.telemetry import Metrics

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


def asgi(
    model: Model | PushModel | str | None = None,
    *,
    authenticate: Authenticator | None = None,
    settings: Settings | None = None,
    **given: Any,
) -> "Asgi":
    """Make an ASGI application; its parent runs its lifespan.

    ::

        chat = wsserver.asgi(my_model, authenticate=user_of)
        app = FastAPI(lifespan=chat.lifespan)
        app.mount("/chat", chat)

    Args:
        model: as for :func:`wsserver.serve`.
        authenticate: as for :func:`wsserver.serve`; ``handshake.scope`` is the scope, in which
            parents keep their user.
        settings: as for :func:`wsserver.serve`. Those of sockets and TLS have no effect.
        given: single settings, by name.

    Raises:
        ConfigError: a setting does not fit, the model is none, or strangers could use the
            application.
    """
    if isinstance(model, str):
        model, given = None, {**given, "model": model}
    if settings is None:
        settings = Settings.load(**given)
    elif given:
        raise TypeError("give either settings or single ones")
    if model is not None:
        models.check(model)
    return Asgi(model, authenticate, settings)


class Asgi:
    """An ASGI application; see :func:`asgi`. It runs once."""

    def __init__(
        self,
        model: Model | PushModel | None,
        authenticate: Authenticator | None,
        settings: Settings,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.memory = Memory(settings.memory)
        self.metrics.watch_memory(self.memory)
        self._model = model
        self._authenticate = authenticate
        self.app: App | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, _: object = None) -> AsyncIterator[None]:
        """Run the application. To be given as the ``lifespan`` of the parent.

        Raises:
            ConfigError: strangers could use the application, or a part cannot start.
        """
        if self.app is not None:
            raise RuntimeError("an application runs once")
        settings = self.settings
        app = App(settings, self._model, self._authenticate, self.metrics, self.memory)
        try:
            await app.start()
            app.admission.loopback = False  # the parent's server may listen anywhere
            if app.admission.authenticate is None and not settings.allow_anonymous:
                raise ConfigError(
                    "strangers could use this application; give `authenticate`, or serve them "
                    "all with allow_anonymous"
                )
        except BaseException:
            await app.release(settings.stop_timeout)
            raise
        app.ready()
        self.app = app
        try:
            yield
        finally:
            await self._close(app)

    async def _close(self, app: App) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.shutdown_timeout
        app.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.shutdown_timeout):
                await app.drain()
        await app.close(min(max(0.1, deadline - loop.time()), self.settings.stop_timeout))
        await app.release(max(0.1, deadline - loop.time()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request or one WebSocket."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if self.app is None:
            raise RuntimeError("give `lifespan=chat.lifespan` to the parent application")
        request = _request(scope, receive, self.settings.open_timeout)
        client = scope.get("client")
        peer = "unix" if client is None else client[0]
        try:
            visitor = self.app.admission.arrive(peer)
        except Denied as denied:
            self.app.denied(denied, peer, request.headers)
            refusal = respond(denied.status, denied.message, headers=denied.headers)
            await _respond(refusal, scope, send)
            return
        visitor.scope = scope
        try:
            if scope["type"] == "websocket":
                await receive()  # websocket.connect
            answer = await self.app.respond(request, visitor)
            if isinstance(answer, Stream):
                await _Body(self.app, answer, receive, send).serve()
            elif isinstance(answer, Response):
                await _respond(answer, scope, send)
            else:
                offered = scope.get("subprotocols", [])
                chosen = next((own for own in answer.subprotocols if own in offered), None)
                await send({"type": "websocket.accept", "subprotocol": chosen})
                await _Socket(self.app, visitor, chosen, receive, send).serve()
        finally:
            self.app.admission.depart(visitor)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Run as an application of its own, which a server asks to start and to stop."""
        await receive()
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.lifespan())
            except Exception as error:
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                raise
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


class _Pump:
    """Sends events in order. ``send`` of ASGI waits until the server has room for more.

    Attributes:
        closed: no event is sent any more.
    """

    def __init__(self, settings: Settings, metrics: Metrics, send: Send) -> None:
        self._settings = settings
        self._metrics = metrics
        self._send = send
        self._events: deque[Event] = deque()
        self._size = 0  # bytes of the events
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
        if self._size > self._settings.max_unsent:
            self._metrics.reader_aborted("too much unsent")
            self.close()
        self._more.set()

    def close(self) -> None:
        """Send nothing more."""
        self.closed = True
        self._events.clear()
        self._more.set()

    async def run(self, wake: Callable[[], None]) -> None:
        """Send events until the last one, or until the pump is closed.

        Args:
            wake: called whenever all events are sent.
        """
        try:
            while not self.closed:
                while self._events:
                    async with asyncio.timeout(self._settings.send_timeout):
                        await self._send(self._events.popleft())
                self._size = 0
                if self._ended:
                    return
                wake()
                self._more.clear()
                if not (self._events or self.closed):
                    await self._more.wait()
        except TimeoutError:
            self._metrics.reader_aborted("does not read")
        except OSError:  # the client has gone
            pass
        finally:
            self.close()


class _Socket:
    """A WebSocket as the transport of a client; see :class:`wsserver.app.ClientTransport`."""

    def __init__(
        self, app: App, visitor: Visitor, subprotocol: str | None, receive: Receive, send: Send
    ) -> None:
        self.id = uuid4()
        self.began = asyncio.get_running_loop().time()
        self.subprotocol = subprotocol
        self.closed_by_client = False
        self.ended_with: int = 1006
        self._app = app
        self._visitor = visitor
        self._receive = receive
        self._pump = _Pump(app.settings, app.metrics, send)
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


class _Body:
    """The body of a streamed response; see :class:`wsserver.responses.BodyWriter`."""

    def __init__(self, app: App, answer: Stream, receive: Receive, send: Send) -> None:
        self._answer = answer
        self._receive = receive
        self._send = send
        self._pump = _Pump(app.settings, app.metrics, send)

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
        sending = watching = None
        try:
            await self._send(_start(self._answer.status, self._answer.headers))
            sending = asyncio.create_task(self._pump.run(producer.wake))
            watching = asyncio.create_task(self._watch())
            producer.open(self)
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [task for task in (sending, watching) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._pump.close()
            producer.closed()

    async def _watch(self) -> None:
        """Wait until the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _request(scope: Scope, receive: Receive, patience: float) -> Request:
    """Return the request of a scope. Its path is the one below the mount."""
    headers: dict[str, str] = {}
    for given, bytes_ in scope["headers"]:
        name, value = given.decode("latin-1").lower(), bytes_.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path.removeprefix(root) or "/"
    query = scope.get("query_string", b"").decode("latin-1")
    target = f"{path}?{query}" if query else path
    if scope["type"] == "websocket":
        headers["upgrade"] = "websocket"  # which servers of HTTP/2 leave out

    async def read_body(limit: int) -> bytes:
        body = bytearray()
        deadline = asyncio.get_running_loop().time() + patience
        try:
            while True:
                async with asyncio.timeout_at(deadline + len(body) / BODY_RATE):
                    event = await receive()
                if event["type"] == "http.disconnect":
                    raise BadRequest(HTTPStatus.BAD_REQUEST, "The request has no end.")
                body += event.get("body", b"")
                if len(body) > limit:
                    raise too_large(limit)
                if not event.get("more_body", False):
                    return bytes(body)
        except TimeoutError:
            raise too_slow() from None

    method = scope.get("method", "GET")
    version = scope.get("http_version", "1.1")
    return Request(method, target, headers, version, read_body)


def _start(status: HTTPStatus, headers: Mapping[str, str], prefix: str = "") -> Event:
    return {
        "type": f"{prefix}http.response.start",
        "status": int(status),
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in headers.items()
        ],
    }


async def _respond(answer: Response, scope: Scope, send: Send) -> None:
    prefix = ""
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # status 403
            return
        prefix = "websocket."
    await send(_start(answer.status, answer.headers, prefix))
    await send({"type": f"{prefix}http.response.body", "body": answer.body})
