"""An ASGI application, to be mounted in FastAPI, Starlette or another one.

The server of the parent application has the sockets; this module turns its scopes and events
(ASGI 3, specs "HTTP & WebSocket" and "Lifespan") into requests and transports of :class:`App`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from wsserver.app import App, configure
from wsserver.asgi_transports import (
    Body,
    Call,
    Held,
    Receive,
    Scope,
    Send,
    SocketTransport,
    start_event,
)
from wsserver.auth import Authenticator
from wsserver.denials import Denied, no_memory
from wsserver.errors import ConfigError
from wsserver.limits import Memory
from wsserver.models.base import Model, PushModel
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
        given: single settings by name. They win over the environment.

    Raises:
        ConfigError: a setting is invalid, or the object cannot be a model.
        TypeError: both ``settings`` and single settings are given.
    """
    chosen, settings = configure(model, settings, given)
    return Asgi(chosen, authenticate, settings)


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
        client = scope.get("client")
        peer = "unix" if client is None else client[0]
        try:
            visitor = self.app.admission.arrive(peer)
        except Denied as denied:
            self.app.denied(denied, peer, _headers(scope))
            refusal = respond(denied.status, denied.message, headers=denied.headers)
            await self._respond(refusal, scope, send)
            return
        visitor.scope = scope
        held = Held(self.memory, visitor)
        call = Call(self.app, visitor, held, receive, send)
        websocket = scope["type"] == "websocket"
        try:
            request = _request(scope, receive, held, self.settings.open_timeout)
            if websocket:
                await receive()  # websocket.connect
            answer = await self.app.respond(request, visitor)
            held.hold(0)  # the body of the request
            if isinstance(answer, Stream) and websocket:
                answer.producer.closed()
                answer = respond(HTTPStatus.BAD_REQUEST, "This address has no WebSocket.")
            if isinstance(answer, Stream):
                await Body(call, answer).serve()
            elif isinstance(answer, Response):
                await self._respond(answer, scope, send)
            else:
                offered = scope.get("subprotocols", [])
                chosen = next((own for own in answer.subprotocols if own in offered), None)
                await send({"type": "websocket.accept", "subprotocol": chosen})
                await SocketTransport(call, chosen).serve()
        finally:
            held.hold(0)
            self.app.admission.depart(visitor)

    async def _respond(self, answer: Response, scope: Scope, send: Send) -> None:
        """Send a whole response. A client has the `send_timeout` to read it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.send_timeout):
                await _send(answer, scope, send)

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


def _headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for given, bytes_ in scope["headers"]:
        name, value = given.decode("latin-1").lower(), bytes_.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _request(scope: Scope, receive: Receive, held: Held, patience: float) -> Request:
    """Return the request of a scope. Its path is the one below the mount."""
    headers = _headers(scope)
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path.removeprefix(root) or "/"
    path = quote(path)  # as in a request: the server has decoded it
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
                if not held.hold(len(body)):
                    raise no_memory()
                if not event.get("more_body", False):
                    return bytes(body)
        except TimeoutError:
            raise too_slow() from None

    method = scope.get("method", "GET")
    version = scope.get("http_version", "1.1")
    return Request(method, target, headers, version, read_body)


async def _send(answer: Response, scope: Scope, send: Send) -> None:
    prefix = ""
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # status 403
            return
        prefix = "websocket."
    await send(start_event(answer.status, answer.headers, prefix))
    await send({"type": f"{prefix}http.response.body", "body": answer.body})
