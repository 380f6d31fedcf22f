"""The application: serves clients over any transport.

The application uses no sockets. A listener passes HTTP requests and opened transports to it, and
gets responses and connections.
"""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from wsserver import auth, models, stores
from wsserver.admission import Admission, Visitor
from wsserver.auth import Authenticator
from wsserver.chats.chats import Chats
from wsserver.chats.replies import ReplyStream
from wsserver.connections.connection import Connection
from wsserver.connections.session import Transport
from wsserver.denials import Denied
from wsserver.errors import ConfigError, StoreError
from wsserver.hub.hub import Hub
from wsserver.limits import Memory
from wsserver.logs import log
from wsserver.models.base import Model, PushModel
from wsserver.protocol import Close
from wsserver.responses import Answer, BadRequest, Request, Response, Upgrade, respond
from wsserver.routes import Operations, Routes
from wsserver.settings import Settings
from wsserver.stores import Store
from wsserver.telemetry import Metrics

if TYPE_CHECKING:
    from wsserver.cluster.cluster import Cluster

CLOSE_BATCH = 100  # clients closed at once, so that they do not all come back at once
CLOSE_PAUSE = 0.1  # seconds between two batches, on average
SHOWN = 256  # characters of a header in the log
RECHECKS = 100  # clients whose tokens are checked at once on a reload
SWEEPS_PER_IDLE_TIME = 10  # checks for idle clients per `idle_timeout`


class ClientTransport(Transport, Protocol):
    """A transport to one client, opened by a listener."""

    began: float
    subprotocol: str | None

    @property
    def id(self) -> UUID:
        """The name of the transport in the log."""
        ...

    @property
    def open(self) -> bool:
        """Whether neither side has begun to close the transport."""
        ...

    @property
    def closed_by_client(self) -> bool:
        """Whether the client has sent a close frame."""
        ...

    @property
    def ended_with(self) -> int:
        """The close code; 1006 if neither side sent one."""
        ...

    async def wait_closed(self) -> None:
        """Wait until the transport is closed."""
        ...


class App:
    """The hub, the store, the model, admission and routes of one server.

    :meth:`start` makes them, :meth:`ready` begins the work that needs clients, :meth:`stop`,
    :meth:`drain`, :meth:`close` and :meth:`release` end them in this order.

    Args:
        settings: the limits, times and addresses.
        model: the model that answers; None for the model that the settings name.
        authenticate: the authenticator; None for the one that the settings name.
        metrics: counts and measures.
        memory: counts the bytes that are held for clients.
    """

    admission: Admission  # decides which clients may connect
    hub: Hub  # runs the generations
    store: Store  # keeps conversations
    model_name: str

    def __init__(
        self,
        settings: Settings,
        model: Model | PushModel | None,
        authenticate: Authenticator | None,
        metrics: Metrics,
        memory: Memory,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.memory = memory
        # The connection of each open transport.
        self.connections: dict[ClientTransport, Connection] = {}
        self.stopping = False  # whether `stop` was called
        self._given_model = model
        self._own_model: Model | PushModel | None = None  # the application made it, and closes it
        self._authenticate = authenticate
        self.cluster: Cluster | None = None  # the other nodes
        self._operations: Operations
        self._routes: Routes
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Make all parts and open the store.

        Raises:
            ConfigError: there is no model of the name in the settings, or a setting cannot be used.
        """
        settings, model = self.settings, self._given_model
        if settings.workers > 1:
            raise ConfigError("workers: only the command `wsserver serve` starts several processes")
        if model is None:
            model = self._own_model = models.make(settings)
        self.model_name = models.name_of(model)
        node = secrets.token_hex(8) if settings.cluster else None
        self.store = stores.make(settings, self.memory, node)
        if self._authenticate is None:
            self._authenticate = auth.make(settings)
        self.admission = Admission(settings, self._authenticate)
        await self.store.open()
        self.hub = Hub(model, self.store, settings, self.metrics, self.memory)
        if node is not None:
            await self._join(node)
        self._operations = Operations(
            self.metrics, self._readiness, settings.secret("metrics_token")
        )
        self._chats = Chats(self.hub, settings)
        self._routes = Routes(settings, self.admission, self._operations, self._chats)

    async def _join(self, node: str) -> None:
        """Become a node of a cluster.

        Raises:
            ConfigError: Redis cannot be used.
        """
        from wsserver.cluster.cluster import Cluster  # noqa: PLC0415
        from wsserver.cluster.figures import Figures  # noqa: PLC0415
        from wsserver.stores.postgres.store import PostgresStore  # noqa: PLC0415

        settings, hub = self.settings, self.hub
        assert isinstance(self.store, PostgresStore)
        cluster = Cluster(
            settings.cluster,
            self.store,
            node,
            hub,
            lease=settings.lease,
            timeout=settings.stop_timeout + settings.store_timeout,
        )
        await cluster.open()
        for part in (hub, hub.accounts, hub.scheduler, hub.retention, hub.conversations):
            part.elsewhere = cluster
        self.cluster = cluster
        self.metrics.add(Figures(cluster))

    def ready(self) -> None:
        """Prepare the model, and start to check for idle clients."""
        self.hub.readiness.prepare()
        self.metrics.watch_loop()
        self._close_idle()

    # Clients.

    def opened(self, transport: ClientTransport, visitor: Visitor) -> Connection:
        """Serve a client from now on.

        Args:
            transport: the way to the client.
            visitor: the client as admission knows it.
        """
        connection = Connection(transport, self.hub, self.settings, visitor)
        self.connections[transport] = connection
        self.metrics.connection_opened()
        if transport.subprotocol is not None:
            connection.greet()
        return connection

    def closed(self, transport: ClientTransport, visitor: Visitor) -> None:
        """Forget a client whose transport is closed."""
        connection = self.connections.pop(transport)
        connection.detach(lost=not transport.closed_by_client)
        self.metrics.connection_closed()
        log.info(
            "connection",
            socket=transport.id,
            address=visitor.address,
            principal=connection.principal,
            seconds=round(asyncio.get_running_loop().time() - transport.began, 3),
            frames=connection.frames,
            code=transport.ended_with,
        )

    def denied(self, denied: Denied, address: str, headers: Mapping[str, str]) -> None:
        """Count and log a client that may not connect."""
        self.metrics.connection_refused(denied.why)
        log.info(
            "connection refused",
            why=denied.why,
            address=address,
            host=headers.get("host", "")[:SHOWN] or None,
            origin=headers.get("origin", "")[:SHOWN] or None,
        )

    def _close_idle(self) -> None:
        """Close the clients that have been idle for the `idle_timeout`, and look again later."""
        timeout = self.settings.idle_timeout
        if not timeout or self.stopping:
            return
        loop = asyncio.get_running_loop()
        for transport, connection in tuple(self.connections.items()):
            since = connection.idle_since
            if since is not None and since + timeout <= loop.time():
                transport.end(Close.NORMAL, "idle")
        self._sweep = loop.call_later(timeout / SWEEPS_PER_IDLE_TIME, self._close_idle)

    # HTTP.

    async def respond(self, request: Request, visitor: Visitor) -> Answer:
        """Answer an HTTP request."""
        try:
            answer = await self._routes.respond(request, visitor)
        except Denied as denied:
            self.denied(denied, visitor.address, request.headers)
            answer = self._routes.deny(denied, request)
        except BadRequest as bad:
            answer = bad.response
        except Exception as error:  # noqa: BLE001
            answer = _failed(error)
        return answer if isinstance(answer, Upgrade) else answer.to(request)

    async def respond_to_operator(self, request: Request, *, check_host: bool) -> Response:
        """Answer an HTTP request at the port for operators.

        Args:
            request: the request.
            check_host: refuse hosts that are not this server's. A page of another site could
                otherwise read the metrics through a name that resolves to loopback.
        """
        try:
            response = await self._routes.respond_to_operator(request, check_host=check_host)
        except Denied as denied:
            response = respond(denied.status, denied.message, headers=denied.headers)
        except Exception as error:  # noqa: BLE001
            response = _failed(error)
        return response.to(request)

    async def _readiness(self) -> Mapping[str, bool]:
        """Return the parts that clients need, and whether each of them works."""
        store = True
        try:
            # Half of the time for a request leaves time for the answer.
            async with asyncio.timeout(self.settings.open_timeout / 2):
                await self.hub.journal.probe()
        except (StoreError, TimeoutError):
            store = False
        return {
            "store": store,
            **({} if self.cluster is None else self.cluster.health),
            "serving": not self.stopping,
            "upstream": not self.hub.reporter.upstream_failing,
        }

    # Reload and end.

    async def reload(self) -> bool:
        """Read the credentials of clients and of operators again.

        Open connections continue, except those of clients whose token is no longer valid.

        Returns:
            Whether all could be read. A part that could not be read stays as it was, and the log
            has the reason.
        """
        done = True
        try:
            self._operations.token = self.settings.secret("metrics_token")
        except ConfigError as error:
            log.error("metrics token not reloaded", reason=str(error))
            done = False
        if self._authenticate is not None:
            done = await auth.reload(self._authenticate) and done
            self.admission.reloads += 1
        connections = self.connections.values()
        clients: Iterator[Connection | ReplyStream] = iter((*connections, *self._chats.streams))
        async with asyncio.TaskGroup() as group:
            for _ in range(RECHECKS):
                group.create_task(_recheck(clients))
        return done

    def stop(self) -> None:
        """Report in `/readyz` that the server accepts no more clients."""
        log.info("stopping", replies=self.hub.live, connections=len(self.connections))
        self.stopping = True
        if self._sweep is not None:
            self._sweep.cancel()

    async def drain(self) -> None:
        """Refuse prompts, wait for replies, and close each client with 1012.

        If there are other nodes, the sockets are closed first: their clients follow the replies
        from there.
        """
        self.hub.refuse_prompts()
        others = self.cluster is not None and await self.cluster.others_stay()
        if others:
            await self._close_clients(delivered=False)
        await self.hub.drain(queued=others)
        await self._chats.delivered()
        await self._close_clients()

    async def _close_clients(self, *, delivered: bool = True) -> None:
        """Close each client with 1012, if so wished after it has the replies that it follows."""
        transports = [transport for transport in self.connections if transport.open]
        random.shuffle(transports)
        async with asyncio.TaskGroup() as group:
            for number, transport in enumerate(transports, start=1):
                group.create_task(self._close_client(transport, delivered=delivered))
                if number % CLOSE_BATCH == 0:
                    await asyncio.sleep(random.uniform(0, 2 * CLOSE_PAUSE))  # noqa: S311

    async def _close_client(self, transport: ClientTransport, *, delivered: bool) -> None:
        connection = self.connections.get(transport)
        if connection is not None:
            if delivered:
                await connection.delivered()
            transport.end(Close.SERVICE_RESTART, "the server restarts")
            await transport.wait_closed()

    async def close(self, within: float) -> None:
        """Stop all replies, save them within some seconds, and leave the cluster."""
        await self.hub.close(within)
        if self.cluster is not None:
            await self.cluster.close()

    async def release(self, within: float) -> None:
        """Close the store, the authenticator and the model, each within some seconds."""
        self.metrics.close()
        if hasattr(self, "store"):
            with contextlib.suppress(TimeoutError, StoreError):
                async with asyncio.timeout(within):
                    await self.store.close()
        within = min(within, self.settings.stop_timeout)
        if self._authenticate is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await auth.close(self._authenticate)
        if self._own_model is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await models.close(self._own_model)


async def _recheck(clients: Iterator[Connection | ReplyStream]) -> None:
    for client in clients:
        if not await client.is_still_valid():
            client.revoke()


def _failed(error: Exception) -> Response:
    log.error("request failed", failure=error)
    return respond(HTTPStatus.INTERNAL_SERVER_ERROR, "A fault of the server's own")


def configure(
    model: Model | PushModel | str | None, settings: Settings | None, given: Mapping[str, Any]
) -> tuple[Model | PushModel | None, Settings]:
    """Return the model object, if there is one, and all settings.

    Args:
        model: the model object, or the setting ``model``.
        settings: all settings. None: they are read from the environment.
        given: single settings by name. They win over the environment.

    Raises:
        ConfigError: a setting is invalid, or the object cannot be a model.
        TypeError: both ``settings`` and single settings are given.
    """
    if isinstance(model, str):
        model, given = None, {**given, "model": model}
    if settings is None:
        settings = Settings.load(**given)
    elif given:
        raise TypeError("give either settings or single settings")
    if model is not None:
        models.check(model)
    return model, settings
