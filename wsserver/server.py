"""The server: listen, answer HTTP, hand each WebSocket a connection, drain and close."""

import asyncio
import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from websockets.http11 import Request, Response

from wsserver import auth, descriptors, listening, models, stores
from wsserver.admission import Admission, Denied, Visitor
from wsserver.auth import Authenticator
from wsserver.connection import Connection
from wsserver.errors import ConfigError, StoreError
from wsserver.hub import Hub
from wsserver.limits import Memory
from wsserver.logs import log
from wsserver.models.base import Model, PushModel
from wsserver.protocol import Close
from wsserver.responses import method_not_allowed, respond
from wsserver.routes import Operations, Page
from wsserver.settings import Settings
from wsserver.stores import Store
from wsserver.telemetry import Metrics
from wsserver.transport import Endpoint
from wsserver.websocket import Socket

__all__ = ["Server", "serve"]

WEBSOCKET_PATHS = ("/", "/ws")
LAST_TURN = 0.1  # seconds for tasks that were cancelled to end, when there is no time left
CLOSE_BATCH = 100  # sockets closed at once, so that their clients do not all come back at once
CLOSE_PAUSE = 0.1  # seconds between batches, on average
SHOWN = 256  # characters of a header in the log
RECHECKS = 100  # clients at once that are asked about again on a reload
LOOKS_PER_IDLE_TIME = 10  # at who has been idle for too long


def serve(
    model: Model | PushModel | str | None = None,
    *,
    authenticate: Authenticator | None = None,
    settings: Settings | None = None,
    sockets: Sequence[listening.StreamSocket] = (),
    **given: Any,
) -> "Server":
    """Make a server; it listens inside ``async with``.

    ::

        async with wsserver.serve(my_model, port=0) as server:
            print(server.url)
            await server.serve_forever()

    Args:
        model: what answers: an async generator from a request to pieces, see
            :class:`wsserver.Model`, a :class:`wsserver.PushModel`, or a name as the setting
            ``model`` takes. Default: that setting.
        authenticate: what tells principals by their tokens, see :class:`wsserver.Authenticator`.
            Default: what the settings ask for.
        settings: all settings at once; without it they are read from the environment.
        sockets: stream sockets to listen on, bound already, in place of the settings' addresses.
            The server closes them.
        given: single settings, by name; they win over the environment.

    Raises:
        ConfigError: a setting does not fit, or the model is none.
    """
    if isinstance(model, str):
        model, given = None, {**given, "model": model}
    if settings is None:
        settings = Settings.load(**given)
    elif given:
        raise TypeError("give either settings or single ones")
    if model is not None:
        models.check(model)
    return Server(model, authenticate, settings, sockets)


class Server:
    """A running server; see :func:`serve`.

    Entering it raises ``OSError`` when it cannot listen on its address, and
    :class:`~wsserver.ConfigError` when there is no model of the name in the settings, when the
    certificate or the unix socket cannot be used, or when strangers could reach it without saying
    who they are. It runs once.

    Attributes:
        settings: what holds here. Once entered, with no more connections and replies than the limit
            of file descriptors allows.
        model_name: what answers, as clients see it.
        port: where it listens, also where the setting was 0; 0 if it has unix sockets alone.
        bound: all addresses that it listens on, as people write them.
        operations_port: the port for operators, where there is one.
        metrics: what it counts and measures.
        memory: the bytes that it holds for its clients.
    """

    model_name: str
    port: int
    bound: tuple[str, ...]
    operations_port: int | None = None

    def __init__(
        self,
        model: Model | PushModel | None,
        authenticate: Authenticator | None,
        settings: Settings,
        sockets: Sequence[listening.StreamSocket] = (),
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.memory = Memory(settings.memory)
        self.metrics.watch_memory(self.memory)
        self._model = model
        self._authenticate = authenticate
        self._page = Page()
        self._admission: Admission
        self._operations: Operations
        self._endpoint: Endpoint
        self._operators: Endpoint | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._connections: dict[Socket, Connection] = {}
        self._hub: Hub
        self._store: Store
        self._given = tuple(sockets)
        self._host = settings.host
        self._certificate: listening.Certificate | None = None
        self._unix_socket: listening.UnixSocket | None = None
        self._own_model: Model | PushModel | None = None  # made here, and so to be closed here
        self._closing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._hurried = False
        self._entered = False
        self._closed = asyncio.Event()

    @property
    def url(self) -> str:
        """The address for WebSocket clients on this machine."""
        scheme = "ws" if self._certificate is None else "wss"
        return f"{scheme}://{self._address}/" if self.port else f"{scheme}+unix:{self.bound[0]}:/"

    @property
    def page(self) -> str:
        """The address for browsers on this machine; that of a unix socket is as nginx has it."""
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://{self._address}/" if self.port else f"{scheme}://unix:{self.bound[0]}:/"

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a server runs once")
        self._entered = True
        settings = self.settings = descriptors.fit(self.settings)
        model = self._model
        if settings.cert:
            self._certificate = listening.Certificate(settings.cert, settings.key)
        if model is None:
            model = self._own_model = models.load(settings)
        self.model_name = models.name_of(model)
        self._store = stores.make(settings, self.memory)
        try:
            if self._authenticate is None:
                self._authenticate = auth.make(settings)
            self._admission = Admission(settings, self._authenticate)
            self._admission.secure = self._certificate is not None
            await self._store.open()
            self._hub = Hub(model, self._store, settings, self.metrics, self.memory)
            self._operations = Operations(
                self.metrics, self._readiness, settings.secret("metrics_token")
            )
            await self._listen()
            self._check_exposure()
            if settings.operations_port is not None:
                await self._listen_for_operators(settings, settings.operations_port)
            self._endpoint.serve()
        except BaseException:
            self._stop_listening()
            if self._operators is not None:
                self._operators.stop_listening()
                self._operators.abort()
                await self._operators.wait_closed()
            await self._release(settings.stop_timeout)
            raise
        self._hub.readiness.prepare()
        self.metrics.watch_loop()
        self._dismiss_idle()
        log.info("listening", addresses=", ".join(self.bound), model=self.model_name)
        return self

    def _check_exposure(self) -> None:
        """Refuse to serve strangers who need not say who they are, unless told so.

        Raises:
            ConfigError: it would.
        """
        settings = self.settings
        self._admission.loopback = listening.loopback(self._endpoint.bound)
        if self._authenticate is not None:
            if settings.allow_anonymous:
                raise ConfigError("allow_anonymous contradicts the tokens; give one or the other")
        elif settings.allow_anonymous:
            log.warning("anyone who reaches this server can spend your money and read everything")
        elif not self._admission.loopback or settings.proxies or settings.hosts:
            why = "it has hosts or proxies" if self._admission.loopback else "it is not on loopback"
            raise ConfigError(
                f"strangers could use this server, as {why}; let them say who they are (make a "
                "token with `wsserver token new NAME --file FILE`, and start with --token-file "
                "FILE), or serve them all with --allow-anonymous"
            )
        else:
            self._admission.users = listening.own_users()

    @property
    def open_to_users(self) -> bool:
        """Whether every user of this machine is served without saying who they are."""
        admission = self._admission
        return admission.authenticate is None and admission.loopback and admission.users is None

    async def reload(self) -> bool:
        """Read anew the certificate, the token for metrics, and what lets clients in.

        Open sockets go on, but for those of clients who would not be let in any more.

        Returns:
            Whether all could be read. What could not stays as it was, and the log says why.
        """
        done = self._certificate is None or self._certificate.reload()
        try:
            self._operations.token = self.settings.secret("metrics_token")
        except ConfigError as error:
            log.error("the token for metrics stays as it was", reason=str(error))
            done = False
        if self._authenticate is not None:
            done = await auth.reload(self._authenticate) and done
            self._admission.reloads += 1
        connections = iter(tuple(self._connections.values()))
        async with asyncio.TaskGroup() as group:
            for _ in range(RECHECKS):
                group.create_task(_recheck(connections))
        return done

    async def _listen(self) -> None:
        settings, sockets = self.settings, self._given
        self._endpoint = Endpoint(
            settings,
            self._respond,
            self.memory,
            admission=self._admission,
            on_denied=self._denied,
            on_open=self._open,
            on_close=self._forget,
            metrics=self.metrics,
            tls=None if self._certificate is None else self._certificate.context,
        )
        if not sockets and settings.unix_socket:
            mode = int(settings.unix_socket_mode, 8)
            self._unix_socket = listening.UnixSocket(settings.unix_socket, mode)
            sockets = (self._unix_socket.sock,)
        for sock in sockets:
            await self._endpoint.bind(sock)
        if not sockets:
            await self._endpoint.bind((settings.host, settings.port))
        self.bound = tuple(listening.name_of(sock) for sock in self._endpoint.bound)
        host, self.port = listening.tcp_address(self._endpoint.bound)
        if self._given:
            self._host = host

    def _stop_listening(self) -> None:
        if hasattr(self, "_endpoint"):
            self._endpoint.stop_listening()
        if self._unix_socket is not None:
            self._unix_socket.remove()

    async def _listen_for_operators(self, settings: Settings, port: int) -> None:
        self._operators = Endpoint(settings, self._respond_to_operator, self.memory)
        try:
            await self._operators.bind((settings.operations_host, port))
            self._operators.serve()
        except OSError as error:
            reason = os.strerror(error.errno or 0) if (error.errno or 0) > 0 else error.strerror
            where = f"{settings.operations_host} port {port}"
            raise ConfigError(f"operations_port: cannot listen on {where}: {reason}") from error
        _, self.operations_port = listening.tcp_address(self._operators.bound)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:  # also when cancelled: leave quickly
            self.hurry()
        await self.close()

    async def prepared(self) -> None:
        """Wait until the model has imported what it needs. Clients are served meanwhile."""
        await self._hub.readiness.prepared()

    async def serve_forever(self) -> None:
        """Wait until the server is closed."""
        if hasattr(self, "port"):
            await self._closed.wait()

    async def close(self) -> None:
        """Drain and close: take no more prompts, let replies finish, close the sockets with 1012.

        It takes no longer than the ``shutdown_timeout``. Idempotent; all callers wait for the end.
        """
        if not hasattr(self, "port"):  # never entered
            return
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    def hurry(self) -> None:
        """Make :meth:`close`, under way or to come, wait for nothing more."""
        self._hurried = True
        if self._leaving is not None:
            self._leaving.cancel()

    async def _close(self) -> None:
        try:
            await self._wind_up()
        finally:
            self._closed.set()

    async def _wind_up(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.shutdown_timeout
        self._stop_listening()
        log.info("stopping", replies=self._hub.live, connections=len(self._connections))
        if self._sweep is not None:
            self._sweep.cancel()
        if not self._hurried:
            self._leaving = loop.create_task(self._leave())
            await asyncio.wait({self._leaving}, timeout=self.settings.shutdown_timeout)
            self._leaving.cancel()
            await asyncio.wait({self._leaving})
        self._endpoint.abort()
        await self._hub.close(min(self._left(deadline), self.settings.stop_timeout))
        if self._operators is not None:  # until now it has told how things stand
            self._operators.stop_listening()
            self._operators.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._left(deadline)):
                await self._endpoint.wait_closed()
                if self._operators is not None:
                    await self._operators.wait_closed()
        await self._release(self._left(deadline))

    def _left(self, deadline: float) -> float:
        left = deadline - asyncio.get_running_loop().time()
        return LAST_TURN if self._hurried else max(LAST_TURN, left)

    async def _release(self, within: float) -> None:
        self.metrics.close()
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(within):
                await self._store.close()
        if self._authenticate is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(within, self.settings.stop_timeout)):
                    await auth.close(self._authenticate)
        if self._own_model is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(within, self.settings.stop_timeout)):
                    await models.close(self._own_model)

    async def _leave(self) -> None:
        await self._hub.drain()
        sockets = [socket for socket in self._connections if socket.open]
        random.shuffle(sockets)
        async with asyncio.TaskGroup() as group:
            for number, socket in enumerate(sockets, start=1):
                group.create_task(self._dismiss(socket))
                if number % CLOSE_BATCH == 0:
                    await asyncio.sleep(random.uniform(0, 2 * CLOSE_PAUSE))  # noqa: S311

    async def _dismiss(self, socket: Socket) -> None:
        connection = self._connections.get(socket)
        if connection is not None:
            await connection.delivered()
            socket.end(Close.SERVICE_RESTART, "the server restarts")
            await socket.wait_closed()

    def _open(self, socket: Socket) -> Connection:
        """Serve a WebSocket from now on."""
        connection = Connection(socket, self._hub, self.settings, socket.visitor)
        self._connections[socket] = connection
        self.metrics.connection_opened()
        if socket.subprotocol is not None:
            connection.greet()
        return connection

    def _forget(self, socket: Socket) -> None:
        """A WebSocket has closed."""
        connection = self._connections.pop(socket)
        connection.detach(lost=not socket.closed_by_client)
        self.metrics.connection_closed()
        log.info(
            "connection",
            socket=socket.id,
            address=socket.visitor.address,
            principal=connection.principal,
            seconds=round(asyncio.get_running_loop().time() - socket.began, 3),
            frames=connection.frames,
            code=socket.ended_with,
        )

    def _dismiss_idle(self) -> None:
        """Close sockets whose clients want nothing any more."""
        timeout = self.settings.idle_timeout
        if not timeout or self._closing is not None:
            return
        loop = asyncio.get_running_loop()
        for socket, connection in tuple(self._connections.items()):
            since = connection.idle_since
            if since is not None and since + timeout <= loop.time():
                socket.end(Close.NORMAL, "idle")
        self._sweep = loop.call_later(timeout / LOOKS_PER_IDLE_TIME, self._dismiss_idle)

    # HTTP.

    @property
    def _address(self) -> str:
        host = self._host
        if host in {"0.0.0.0", "::", ""}:  # noqa: S104
            host = "localhost"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    async def _respond(self, visitor: Visitor | None, request: Request) -> Response | None:
        """Answer what is not a WebSocket handshake; None lets one begin."""
        assert visitor is not None
        try:
            return await self._answer(visitor, request)
        except Exception as error:  # noqa: BLE001
            return _failed(error)

    async def _answer(self, visitor: Visitor, request: Request) -> Response | None:
        headers = _lower(request)
        path = request.path.partition("?")[0]
        websocket = "websocket" in headers.get("upgrade", "").lower()
        try:
            visitor.introduce(headers)
            if path not in {"/healthz", "/readyz"}:  # which probes ask for by any name
                visitor.check_room()
                self._admission.check_host(headers)
            if websocket and path in WEBSOCKET_PATHS and request.method == "GET":
                await visitor.knock(request.path, headers)
                return None
            if path in Page.PATHS:  # which could tell nobody why it may not connect
                visitor.check_private(headers)
            return await self._get(path, request.method, headers, visitor)
        except Denied as denied:
            self._denied(denied, visitor.address, headers)
            return respond(denied.status, denied.message, headers=denied.headers)

    async def _get(
        self, path: str, method: str, headers: Mapping[str, str], visitor: Visitor
    ) -> Response:
        operations = self._operations.PATHS if self._operators is None else ("/healthz",)
        if path not in {*WEBSOCKET_PATHS, *Page.PATHS, *operations}:
            response = respond(HTTPStatus.NOT_FOUND, "Not found")
        elif method not in {"GET", "HEAD"}:
            response = method_not_allowed()
        elif path in Page.PATHS:
            response = self._page.respond(path, headers)
        elif path in operations:
            # Where strangers may be, one that seems to be on this machine may be behind a proxy.
            private = self._authenticate is None and not self.settings.allow_anonymous
            trusted = private and visitor.local(headers)
            response = await self._operations.respond(path, headers, trusted=trusted)
        else:
            response = respond(
                HTTPStatus.UPGRADE_REQUIRED,
                "This address speaks WebSocket; the page is at /",
                headers={"Upgrade": "websocket"},
            )
        return _without_body(response) if method == "HEAD" else response

    async def _respond_to_operator(self, _: Visitor | None, request: Request) -> Response:
        path = request.path.partition("?")[0]
        headers = _lower(request)
        assert self._operators is not None
        try:
            # Where others can reach it, they need no page to read it for them.
            if path == "/metrics" and listening.loopback(self._operators.bound):
                self._admission.check_host(headers)
            if path not in self._operations.PATHS:
                response = respond(HTTPStatus.NOT_FOUND, "Not found")
            elif request.method not in {"GET", "HEAD"}:
                response = method_not_allowed()
            else:
                response = await self._operations.respond(path, headers, trusted=True)
        except Denied as denied:
            response = respond(denied.status, denied.message, headers=denied.headers)
        except Exception as error:  # noqa: BLE001
            response = _failed(error)
        return _without_body(response) if request.method == "HEAD" else response

    async def _readiness(self) -> Mapping[str, bool]:
        """Tell what it takes to serve clients, part by part, and whether it is there."""
        store = True
        try:
            # Before the time for a request is up, so that there is an answer.
            async with asyncio.timeout(self.settings.open_timeout / 2):
                await self._hub.probe()
        except (StoreError, TimeoutError):
            store = False
        return {
            "store": store,
            "serving": self._closing is None,
            "upstream": not self._hub.upstream_failing,
        }

    def _denied(self, denied: Denied, address: str, headers: Mapping[str, str]) -> None:
        self.metrics.connection_refused(denied.why)
        log.info(
            "connection refused",
            why=denied.why,
            address=address,
            host=headers.get("host", "")[:SHOWN] or None,
            origin=headers.get("origin", "")[:SHOWN] or None,
        )


async def _recheck(connections: Iterator[Connection]) -> None:
    for connection in connections:
        if not await connection.still_welcome():
            connection.revoke()


def _failed(error: Exception) -> Response:
    log.error("a request could not be answered", failure=error)
    return respond(HTTPStatus.INTERNAL_SERVER_ERROR, "A fault of the server's own")


def _without_body(response: Response) -> Response:
    response.body = b""
    return response


def _lower(request: Request) -> dict[str, str]:
    """Return a request's headers by their names in lower case, repeated ones as one list."""
    headers: dict[str, str] = {}
    for given, value in request.headers.raw_items():
        name = given.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
