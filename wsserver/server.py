"""The server: listen, answer HTTP, hand each WebSocket a connection, drain and close."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import http
import importlib.resources
import random
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.typing import Subprotocol

from wsserver import listening, models, stores
from wsserver.connection import Connection
from wsserver.errors import StoreError
from wsserver.hub import Hub
from wsserver.models.base import Model
from wsserver.protocol import SUBPROTOCOL, Close
from wsserver.settings import Settings
from wsserver.stores import Store
from wsserver.transport import Socket

__all__ = ["Server", "serve"]

WEBSOCKET_PATHS = ("/", "/ws")
MESSAGES_PER_TURN = 16  # taken from a client that sends without a pause, before others get theirs
LAST_TURN = 0.1  # seconds for tasks that were cancelled to end, when there is no time left
CLOSE_BATCH = 100  # sockets closed at once, so that their clients do not all come back at once
CLOSE_PAUSE = 0.1  # seconds between batches, on average


def serve(
    model: Model | str | None = None,
    *,
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
            :class:`wsserver.Model`, or a name as the setting ``model`` takes. Default: that
            setting.
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
    return Server(model, settings, sockets)


class Server:
    """A running server; see :func:`serve`.

    Entering it raises ``OSError`` when it cannot listen on its address, and
    :class:`~wsserver.ConfigError` when there is no model of the name in the settings, or when the
    certificate or the unix socket cannot be used. It runs once.

    Attributes:
        settings: what holds here.
        model_name: what answers, as clients see it.
        port: where it listens, also where the setting was 0; 0 if it has unix sockets alone.
        bound: all addresses that it listens on, as people write them.
    """

    model_name: str
    port: int
    bound: tuple[str, ...]

    def __init__(
        self,
        model: Model | None,
        settings: Settings,
        sockets: Sequence[listening.StreamSocket] = (),
    ) -> None:
        self.settings = settings
        self._model = model
        self._page = _Page()
        self._sockets: set[Socket] = set()
        self._connections: dict[Socket, Connection] = {}
        self._hub: Hub
        self._store: Store
        self._given = tuple(sockets)
        self._host = settings.host
        self._certificate: listening.Certificate | None = None
        self._unix_socket: listening.UnixSocket | None = None
        self._listeners: list[Listener] = []
        self._own_model: Model | None = None  # made here, and so to be closed here
        self._closing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._hurried = False
        self._entered = False

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
        settings, model = self.settings, self._model
        if settings.cert:
            self._certificate = listening.Certificate(settings.cert, settings.key)
        if model is None:
            model = self._own_model = models.load(settings)
        self.model_name = models.name_of(model)
        self._store = stores.make(settings)
        try:
            await self._store.open()
            self._hub = Hub(model, self._store, settings)
            await self._listen()
        except BaseException:
            self._stop_listening()
            await self._release(settings.stop_timeout)
            raise
        return self

    async def reload(self) -> bool:
        """Read the certificate's files again, for new connections; those there are go on.

        Returns:
            Whether all could be read. What could not stays as it was, and the log says why.
        """
        return self._certificate is None or self._certificate.reload()

    async def _listen(self) -> None:
        settings, sockets = self.settings, self._given
        start = functools.partial(
            listen,
            self._handle,
            process_request=self._respond,
            select_subprotocol=_select_subprotocol,
            create_connection=functools.partial(  # type: ignore[arg-type]
                Socket,
                settings=settings,
                sockets=self._sockets,
                method_not_allowed=_method_not_allowed().serialize(),
            ),
            compression=None,  # costs 40 KiB a socket and half of the send rate
            open_timeout=settings.open_timeout,
            ping_interval=settings.ping_interval,
            ping_timeout=settings.ping_timeout,
            close_timeout=settings.send_timeout,
            max_size=settings.message_size,
            write_limit=settings.write_buffer,
            server_header=None,
            ssl=None if self._certificate is None else self._certificate.context,
        )
        if not sockets and settings.unix_socket:
            mode = int(settings.unix_socket_mode, 8)
            self._unix_socket = listening.UnixSocket(settings.unix_socket, mode)
            sockets = (self._unix_socket.sock,)
        for sock in sockets:
            self._listeners.append(await start(sock=sock))
        if not sockets:
            self._listeners.append(await start(settings.host, settings.port))
        self.bound = tuple(listening.name_of(sock) for sock in self._bound)
        host, self.port = listening.tcp_address(self._bound)
        if self._given:
            self._host = host

    @property
    def _bound(self) -> list[listening.Listening]:
        return [sock for listener in self._listeners for sock in listener.sockets]

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close(close_connections=False)
        if self._unix_socket is not None:
            self._unix_socket.remove()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:  # also when cancelled: leave quickly
            self.hurry()
        await self.close()

    async def serve_forever(self) -> None:
        """Wait until the server is closed."""
        for listener in self._listeners:
            await listener.wait_closed()

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
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.shutdown_timeout
        self._stop_listening()
        if not self._hurried:
            self._leaving = loop.create_task(self._leave())
            await asyncio.wait({self._leaving}, timeout=self.settings.shutdown_timeout)
            self._leaving.cancel()
            await asyncio.wait({self._leaving})
        for socket in tuple(self._sockets):
            socket.abort()
        await self._hub.close(min(self._left(deadline), self.settings.stop_timeout))
        # A TLS handshake can be neither waited for nor aborted from here; it ends by its own time.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._left(deadline)):
                await self.serve_forever()
        await self._release(self._left(deadline))

    def _left(self, deadline: float) -> float:
        left = deadline - asyncio.get_running_loop().time()
        return LAST_TURN if self._hurried else max(LAST_TURN, left)

    async def _release(self, within: float) -> None:
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(within):
                await self._store.close()
        if self._own_model is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(within, self.settings.stop_timeout)):
                    await models.close(self._own_model)

    async def _leave(self) -> None:
        await self._hub.drain()
        sockets = [socket for socket in self._connections if socket.state is State.OPEN]
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
            await socket.close(Close.SERVICE_RESTART, "the server restarts")

    async def _handle(self, socket: ServerConnection) -> None:
        """Serve one WebSocket until it closes."""
        assert isinstance(socket, Socket)
        connection = Connection(socket, self._hub, self.settings)
        socket.wake = connection.wake
        self._connections[socket] = connection
        try:
            with contextlib.suppress(ConnectionClosed):
                turn = 0
                async for message in socket:
                    if not connection.receive(message):
                        await socket.close(Close.POLICY_VIOLATION, "too many unusable frames")
                        return
                    turn += 1
                    if turn == MESSAGES_PER_TURN:
                        turn = 0
                        await asyncio.sleep(0)
        finally:
            connection.detach()
            del self._connections[socket]

    # HTTP.

    @property
    def _address(self) -> str:
        host = self._host
        if host in {"0.0.0.0", "::", ""}:  # noqa: S104
            host = "localhost"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def _respond(self, _: ServerConnection, request: Request) -> Response | None:
        """Answer what is not a WebSocket handshake; None lets the library go on with one."""
        path = request.path.partition("?")[0]
        websocket = "websocket" in ",".join(request.headers.get_all("Upgrade")).lower()
        if websocket and path in WEBSOCKET_PATHS and request.method == "GET":
            return None
        if path not in {*WEBSOCKET_PATHS, "/healthz"}:
            response = _response(http.HTTPStatus.NOT_FOUND, b"Not found\n")
        elif request.method not in {"GET", "HEAD"}:
            response = _method_not_allowed()
        elif path == "/":
            response = self._page.respond()
        elif path == "/healthz":
            response = _response(http.HTTPStatus.OK, b"ok\n")
        else:
            response = _response(
                http.HTTPStatus.UPGRADE_REQUIRED,
                b"This address speaks WebSocket; the page is at /\n",
                headers={"Upgrade": "websocket"},
            )
        if request.method == "HEAD":
            response.body = b""
        return response


class _Page:
    """The page at ``/``, and the policy that lets it run its own script and no other."""

    def __init__(self) -> None:
        self._body = importlib.resources.files("wsserver").joinpath("web/index.html").read_bytes()
        script = _hashes(self._body, b"script")
        style = _hashes(self._body, b"style")
        self._policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def respond(self) -> Response:
        return _response(
            http.HTTPStatus.OK,
            self._body,
            "text/html; charset=utf-8",
            {"Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer"},
        )


def _hashes(page: bytes, tag: bytes) -> str:
    """Name the inline scripts or styles of a page by their hashes (CSP level 3, section 2.3.1)."""
    found = re.findall(b"<%b[^>]*>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _response(
    status: http.HTTPStatus,
    body: bytes,
    content_type: str = "text/plain; charset=utf-8",
    headers: Mapping[str, str] | None = None,
) -> Response:
    common = {
        "Connection": "close",
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(status.value, status.phrase, Headers({**common, **(headers or {})}), body)


def _method_not_allowed() -> Response:
    return _response(
        http.HTTPStatus.METHOD_NOT_ALLOWED,
        b"Method not allowed\n",
        headers={"Allow": "GET, HEAD"},
    )


def _select_subprotocol(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # A client that offers none, or others, is served all the same: most offer none.
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None
