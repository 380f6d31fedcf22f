"""The server: it starts and closes the application and its listeners."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any, Self

from wsserver import descriptors
from wsserver.admission import Visitor
from wsserver.app import App, configure
from wsserver.auth import Authenticator
from wsserver.errors import ConfigError
from wsserver.limits import Memory
from wsserver.logs import log
from wsserver.models.base import Model, PushModel
from wsserver.responses import Answer, Request
from wsserver.settings import Settings
from wsserver.sockets import listening
from wsserver.sockets.certificates import Certificate
from wsserver.sockets.listener import Listener
from wsserver.sockets.peers import own_users
from wsserver.telemetry import Metrics

LAST_TURN = 0.1  # seconds for cancelled tasks to end, even when the time is over


def serve(
    model: Model | PushModel | str | None = None,
    *,
    authenticate: Authenticator | None = None,
    settings: Settings | None = None,
    sockets: Sequence[listening.StreamSocket] = (),
    **given: Any,
) -> "Server":
    """Make a server. It listens inside ``async with``.

    ::

        async with wsserver.serve(my_model, port=0) as server:
            print(server.url)
            await server.serve_forever()

    Args:
        model: a :class:`wsserver.Model`, such as an async generator function; a
            :class:`wsserver.PushModel`; or a name, as in the setting ``model``. Default: the model
            of the setting.
        authenticate: returns the principal of a token; see :class:`wsserver.Authenticator`.
            Default: the authenticator of the settings.
        settings: all settings. Default: they are read from the environment.
        sockets: bound stream sockets to listen on, instead of the addresses in the settings. The
            server closes them.
        given: single settings by name. They win over the environment.

    Raises:
        ConfigError: a setting is invalid, or the object cannot be a model.
        TypeError: both ``settings`` and single settings are given.
    """
    chosen, settings = configure(model, settings, given)
    return Server(chosen, authenticate, settings, sockets)


class Server:
    """A server; see :func:`serve`. It listens inside ``async with``, once.

    Entering raises ``OSError`` if the server cannot listen on its address. It raises
    :class:`~wsserver.ConfigError` if the settings name no model, if the certificate or the unix
    socket cannot be used, or if clients without a token could reach the server from outside.

    Attributes:
        settings: the settings. Once the server is entered, they allow no more connections and
            replies than the limit of file descriptors.
        metrics: the numbers that the server counts and measures.
        memory: counts the bytes that the server holds for its clients.
        app: the application. This attribute and the following ones exist once the server is
            entered.
        listener: the listening sockets for clients, and their connections.
        model_name: the model's name for clients.
        port: the TCP port that the server listens on; 0 if it has only unix sockets.
        bound: all addresses that the server listens on, such as ``[::1]:3001`` or a path.
        operators: the listener for operators; None without an ``operations_port``.
        operations_port: the port for operators; None without one.
    """

    app: App
    listener: Listener
    model_name: str
    port: int
    bound: tuple[str, ...]
    operators: Listener | None = None
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
        self._given = tuple(sockets)
        self._host = settings.host
        self._certificate: Certificate | None = None
        self._unix_socket: listening.UnixSocket | None = None
        self._closing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._hurried = False
        self._entered = False
        self._running = False  # entered without a failure
        self._closed = asyncio.Event()

    @property
    def url(self) -> str:
        """The address for WebSocket clients on this machine."""
        scheme = "ws" if self._certificate is None else "wss"
        return f"{scheme}://{self._address}/" if self.port else f"{scheme}+unix:{self.bound[0]}:/"

    @property
    def page(self) -> str:
        """The address for browsers on this machine. A unix socket is written as in nginx."""
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://{self._address}/" if self.port else f"{scheme}://unix:{self.bound[0]}:/"

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a server runs once")
        self._entered = True
        settings = self.settings = descriptors.fit(self.settings)
        if settings.cert:
            self._certificate = Certificate(settings.cert, settings.key)
        app = App(settings, self._model, self._authenticate, self.metrics, self.memory)
        self.app = app
        try:
            await app.start()
            self.model_name = app.model_name
            app.admission.secure = self._certificate is not None
            await self._listen()
            self._check_exposure()
            if settings.operations_port is not None:
                await self._listen_for_operators(settings, settings.operations_port)
            self.listener.serve()
        except BaseException:
            self._stop_listening()
            if self.operators is not None:
                self.operators.stop_listening()
                self.operators.abort()
                await self.operators.wait_closed()
            await app.release(settings.stop_timeout)
            raise
        self._running = True
        app.ready()
        log.info("listening", addresses=", ".join(self.bound), model=self.model_name)
        return self

    def _check_exposure(self) -> None:
        """Refuse to serve clients without a token from outside, unless the settings allow it.

        Raises:
            ConfigError: clients without a token could reach the server from outside.
        """
        settings, admission = self.settings, self.app.admission
        admission.loopback = listening.loopback(self.listener.bound)
        if admission.authenticate is not None:
            if settings.allow_anonymous:
                raise ConfigError("allow_anonymous contradicts the tokens; give one or the other")
        elif settings.allow_anonymous:
            log.warning("anyone who reaches this server can spend your money and read everything")
        elif not admission.loopback or settings.proxies or settings.hosts:
            why = "it has hosts or proxies" if admission.loopback else "it is not on loopback"
            raise ConfigError(
                f"everyone could use this server without a token, because {why}; make a token with "
                "`wsserver token new NAME --file FILE` and start with --token-file FILE, or serve "
                "everyone with --allow-anonymous"
            )
        else:
            admission.users = own_users()

    @property
    def open_to_users(self) -> bool:
        """Whether every user of this machine is served without a token."""
        admission = self.app.admission
        return admission.authenticate is None and admission.loopback and admission.users is None

    async def reload(self) -> bool:
        """Read the certificate, the token for metrics and the credentials of clients again.

        Open sockets continue, except those of clients whose token is no longer valid.

        Returns:
            False if a part could not be read. Such a part stays as it was, and the log has the
            reason.
        """
        done = self._certificate is None or self._certificate.reload()
        return await self.app.reload() and done

    async def _listen(self) -> None:
        settings, sockets = self.settings, self._given
        self.listener = Listener(
            settings,
            self._respond,
            self.memory,
            self.metrics,
            admission=self.app.admission,
            on_denied=self.app.denied,
            on_open=self.app.opened,
            on_close=self.app.closed,
            tls=None if self._certificate is None else self._certificate.context,
        )
        if not sockets and settings.unix_socket:
            mode = int(settings.unix_socket_mode, 8)
            self._unix_socket = listening.UnixSocket(settings.unix_socket, mode)
            sockets = (self._unix_socket.sock,)
        for sock in sockets:
            await self.listener.bind(sock)
        if not sockets:
            await self.listener.bind((settings.host, settings.port))
        self.bound = tuple(listening.name_of(sock) for sock in self.listener.bound)
        host, self.port = listening.tcp_address(self.listener.bound)
        if self._given:
            self._host = host

    def _stop_listening(self) -> None:
        if hasattr(self, "listener"):
            self.listener.stop_listening()
        if self._unix_socket is not None:
            self._unix_socket.remove()

    async def _listen_for_operators(self, settings: Settings, port: int) -> None:
        self.operators = Listener(settings, self._respond_to_operator, self.memory, self.metrics)
        try:
            await self.operators.bind((settings.operations_host, port))
            self.operators.serve()
        except OSError as error:
            reason = os.strerror(error.errno or 0) if (error.errno or 0) > 0 else error.strerror
            where = f"{settings.operations_host} port {port}"
            raise ConfigError(f"operations_port: cannot listen on {where}: {reason}") from error
        _, self.operations_port = listening.tcp_address(self.operators.bound)

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None:  # a cancellation included
            self.hurry()
        await self.close()

    async def prepared(self) -> None:
        """Wait until the model is prepared. The server already serves clients."""
        await self.app.hub.readiness.prepared()

    async def serve_forever(self) -> None:
        """Wait until the server is closed."""
        if self._running:
            await self._closed.wait()

    async def close(self) -> None:
        """Refuse new prompts, let replies finish, and close the sockets with 1012.

        This takes at most the ``shutdown_timeout``. Idempotent: all callers wait for the end.
        """
        if not self._running:
            return
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    def hurry(self) -> None:
        """Make :meth:`close` end at once, whether it is running or called later."""
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
        self.app.stop()
        if not self._hurried:
            self._leaving = loop.create_task(self.app.drain())
            await asyncio.wait({self._leaving}, timeout=self.settings.shutdown_timeout)
            self._leaving.cancel()
            await asyncio.wait({self._leaving})
        self.listener.abort()
        await self.app.close(min(self._left(deadline), self.settings.stop_timeout))
        if self.operators is not None:  # `/readyz` and `/metrics` answer until here
            self.operators.stop_listening()
            self.operators.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._left(deadline)):
                await self.listener.wait_closed()
                if self.operators is not None:
                    await self.operators.wait_closed()
        await self.app.release(self._left(deadline))

    def _left(self, deadline: float) -> float:
        left = deadline - asyncio.get_running_loop().time()
        return LAST_TURN if self._hurried else max(LAST_TURN, left)

    @property
    def _address(self) -> str:
        host = self._host
        if host in {"0.0.0.0", "::", ""}:  # noqa: S104
            host = "localhost"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    async def _respond(self, request: Request, visitor: Visitor | None) -> Answer:
        assert visitor is not None
        return await self.app.respond(request, visitor)

    async def _respond_to_operator(self, request: Request, _: Visitor | None) -> Answer:
        assert self.operators is not None
        # Pages of other sites can reach loopback through a name that resolves to it.
        check_host = listening.loopback(self.operators.bound)
        return await self.app.respond_to_operator(request, check_host=check_host)
