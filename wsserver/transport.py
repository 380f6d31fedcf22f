"""Connections from accept to the response of their request.

A connection begins as an :class:`Exchange`: one HTTP request and its response. Where the request
opens a WebSocket, a :class:`~wsserver.websocket.Socket` replaces the exchange.
"""

import asyncio
import functools
import socket
import ssl
import typing
from asyncio.sslproto import SSLProtocol
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus

from websockets.datastructures import Headers
from websockets.http11 import Request as Handshake
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from wsserver.admission import Admission, Denied, Visitor, no_memory
from wsserver.descriptors import AT_ONCE, OPERATORS, SPARE, lingering
from wsserver.http import BadRequest, HeadParser
from wsserver.limits import Memory
from wsserver.listening import Acceptor, bound
from wsserver.peers import ELSEWHERE, NOBODY, established, user_at
from wsserver.responses import Answer, Request, Response, Upgrade, respond
from wsserver.settings import Settings
from wsserver.telemetry import Metrics
from wsserver.websocket import READ_SIZE, SILENT, Receiver, Socket, Wire, half_close

__all__ = ["Endpoint", "Exchange"]

REQUEST_COST = 8192  # bytes in memory of a request besides its head, until the response
HEADER_COST = 512  # bytes in memory of each line of a head besides its text
LINGER = 1.0  # seconds for a refused client to read the response


class Endpoint:
    """Listening sockets, and what all connections that they accept have in common.

    Args:
        settings: the times and limits.
        answer: answers a request, or allows it to open a WebSocket.
        memory: counts the bytes that clients sent or do not read.
        admission: the rules for connections; None accepts all.
        on_denied: called with each refusal of a connection.
        on_open: called with each WebSocket that opens; returns what serves it.
        on_close: called with each WebSocket that has closed.
        metrics: counts aborted readers.
        tls: the TLS context; None for plain TCP.

    Attributes:
        connections: all connections, also those that are no WebSocket yet.
        turned_away: the refused connections, the oldest first.
        spare: the connections in places for probes, the oldest first.
        answering: the tasks that answer requests, also of clients that have gone.
        closing: whether no WebSocket may open any more.
        buffer: the buffer that all connections read into. A connection takes its data in the
            callback of the read, before another connection can read. All event loops do so.
    """

    def __init__(
        self,
        settings: Settings,
        answer: Callable[[Request, Visitor | None], Awaitable[Answer]],
        memory: Memory,
        *,
        admission: Admission | None = None,
        on_denied: Callable[[Denied, str, Mapping[str, str]], None] | None = None,
        on_open: Callable[["Socket", Visitor], "Receiver"] | None = None,
        on_close: Callable[["Socket", Visitor], None] | None = None,
        metrics: Metrics | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.settings = settings
        self.answer = answer
        self.memory = memory
        self.admission = admission
        self.on_denied = on_denied
        self.on_open = on_open
        self.on_close = on_close
        self.metrics = metrics
        self.tls = tls
        self.loop = asyncio.get_running_loop()
        self.connections: set[Exchange | Socket] = set()
        self.turned_away: dict[Exchange, None] = {}
        self.spare: dict[Exchange, None] = {}
        self.answering: set[asyncio.Task[None]] = set()
        self.closing = False
        self.buffer = memoryview(bytearray(READ_SIZE))  # which asyncio's TLS can fill bit by bit
        self._acceptors: list[Acceptor] = []
        self._lingering = lingering(settings)

    @property
    def bound(self) -> list[socket.socket]:
        """The listening sockets."""
        return [acceptor.sock for acceptor in self._acceptors]

    async def bind(self, where: socket.socket | tuple[str, int]) -> None:
        """Bind a host and port, or take a bound socket, without accepting connections yet.

        Raises:
            OSError: the address cannot be bound.
        """
        for sock in await bound(*where) if isinstance(where, tuple) else [where]:
            self._acceptors.append(Acceptor(sock, self._protocol, self._full))

    def serve(self) -> None:
        """Begin to accept connections."""
        for acceptor in self._acceptors:
            acceptor.start()

    def stop_listening(self) -> None:
        """Accept no more connections, and open no more WebSockets."""
        self.closing = True
        for acceptor in self._acceptors:
            acceptor.close()

    def abort(self) -> None:
        """Abort all connections."""
        for task in self.answering:
            task.cancel()
        for connection in tuple(self.connections):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until all connections are closed."""
        ended = (connection.wait_closed() for connection in self.connections)
        await asyncio.gather(*self.answering, *ended, return_exceptions=True)

    def turn_away(self, exchange: "Exchange", denied: Denied, peer: str) -> None:
        """Keep a refused connection for a moment; abort the oldest of too many."""
        assert self.on_denied is not None
        self.on_denied(denied, peer, {})
        _keep(self.turned_away, exchange, self._lingering)

    def take_spare(self, exchange: "Exchange") -> None:
        """Note a connection in a place for probes; abort the oldest of too many."""
        _keep(self.spare, exchange, SPARE)

    def _full(self) -> bool:
        """Whether one more connection would take a descriptor that other parts need."""
        if self.admission is None:
            return len(self.connections) >= OPERATORS
        beside = SPARE + self._lingering + AT_ONCE
        return len(self.connections) >= self.settings.connections + beside

    def _protocol(self) -> asyncio.BaseProtocol:
        exchange = Exchange(self)
        return exchange if self.tls is None else _Tls(self, exchange, self.tls)


class Exchange(Wire):
    """One request and its response. A WebSocket may open; any other connection then closes."""

    __slots__ = (
        "_answering",
        "_below",
        "_denied",
        "_early",
        "_head",
        "_timer",
    )

    _endpoint: Endpoint

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.visitor = None
        self._denied: Denied | None = None
        self._below: asyncio.Transport | None = None  # the TCP transport under TLS
        self._timer: asyncio.TimerHandle | None = None
        self._head = HeadParser()
        self._answering = False  # may last longer than the connection
        # Bytes that came before the response, such as frames; None: bytes that come are dropped.
        self._early: bytes | None = b""

    def arrive(self, transport: asyncio.Transport) -> None:
        """Count the connection, one with TLS before its handshake."""
        endpoint = self._endpoint
        self.transport = transport
        endpoint.connections.add(self)
        name = transport.get_extra_info("peername")
        here = transport.get_extra_info("sockname")
        # A client of a unix socket may have a name. A client that has gone has no address.
        peer = name[0] if isinstance(name, tuple) else "gone" if isinstance(here, tuple) else "unix"
        try:
            if endpoint.admission is not None:
                matters = endpoint.admission.users is not None and isinstance(name, tuple)
                user = user_at(name, here) if matters else None
                # Checked after the user: a client that has just closed is not elsewhere.
                if user == ELSEWHERE and not established(transport.get_extra_info("socket")):
                    user = NOBODY
                self.visitor = endpoint.admission.arrive(peer, user)
                if self.visitor.spare:
                    endpoint.take_spare(self)
        except Denied as denied:
            self._denied = denied
            self._timer = endpoint.loop.call_later(LINGER, self.abort)
            endpoint.turn_away(self, denied, peer)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request, or refuse the connection at once."""
        transport = typing.cast("asyncio.Transport", transport)  # uvloop's are no subclass
        if self._endpoint.tls is None:
            self.arrive(transport)
        else:
            self._below, self.transport = self.transport, transport
            transport.set_read_buffer_limits(READ_SIZE)  # type: ignore[attr-defined]
        if self._denied is None:
            timeout = self._endpoint.settings.open_timeout
            self._timer = self._endpoint.loop.call_later(timeout, self.abort)
        else:
            denied = self._denied
            self._write_and_drop(_refusal(denied))

    def tls_ready(self, tls: "asyncio.Future[None]") -> None:
        """The TLS handshake finished or failed. No other callback reports a failure."""
        if tls.cancelled() or tls.exception() is not None or self._below is None:
            self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. A task that answers its request goes on."""
        self._endpoint.turned_away.pop(self, None)
        self._endpoint.spare.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        self._head.close()
        if not self._answering:
            self._hold(0)

    def buffer_updated(self, size: int) -> None:
        """Parse the head of the request, and have the request answered."""
        if self._early is None:
            return
        data = bytes(self._endpoint.buffer[:size])
        request = None
        if self._head.complete:
            self._keep(data)
        else:
            try:
                parsed = self._head.feed(data)
            except BadRequest as bad:
                self._write_and_drop(bad.response.encode())
                return
            if parsed is not None:
                request, early = parsed
                self._keep(early)
        cost = REQUEST_COST + HEADER_COST * self._head.lines
        if not self._hold(cost + self._head.size + len(self._early)):
            self._deny(no_memory())
        elif request is not None:
            self._answering = True
            task = self._endpoint.loop.create_task(self._answer(request))
            self._endpoint.answering.add(task)
            task.add_done_callback(self._endpoint.answering.discard)

    def _deny(self, denied: Denied) -> None:
        """Refuse the connection after its head has come."""
        if self._endpoint.on_denied is not None and self.visitor is not None:
            self._endpoint.on_denied(denied, self.visitor.address, {})
        self._write_and_drop(_refusal(denied))

    def _keep(self, data: bytes) -> None:
        """Keep bytes that come before the response, and read no more than one buffer of them."""
        if self._early is not None and data:
            self._early += data
            if len(self._early) >= READ_SIZE:
                self.transport.pause_reading()

    def _write_and_drop(self, response: bytes) -> None:
        """Write the last response of the connection, and read no more requests.

        Later bytes are read and dropped until the client closes or the time for a request is over.
        To close a connection with unread bytes would reset it, and the client would lose the
        response.
        """
        self._head.close()
        self.transport.write(response)
        if self.transport.can_write_eof():
            half_close(self.transport)
        early, self._early = self._early, None
        self._hold(0)
        if early and not self.transport.is_closing():
            self.transport.resume_reading()

    async def _answer(self, request: Request) -> None:
        try:
            async with asyncio.timeout(self._endpoint.settings.open_timeout):
                answer = await self._endpoint.answer(request, self.visitor)
        except TimeoutError:
            return  # the timer aborts the connection at the same time
        finally:
            self._answering = False
            if self not in self._endpoint.connections:
                self._hold(0)
        if self.transport.is_closing() or self._early is None:  # gone, or answered
            return
        if isinstance(answer, Response):
            self._write_and_drop(answer.encode())
        elif self._endpoint.closing:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            self._write_and_drop(respond(status, "The server is shutting down.").encode())
        else:
            self._upgrade(request, answer)

    def _upgrade(self, request: Request, upgrade: Upgrade) -> None:
        """Answer the opening handshake of a WebSocket (RFC 6455 section 4.2)."""
        library = ServerProtocol(logger=SILENT)
        # A bound method would keep this exchange alive in a reference cycle.
        choose = functools.partial(_choose, upgrade.subprotocols)
        library.select_subprotocol = choose  # type: ignore[method-assign]
        headers = Headers(request.headers)
        version = f"HTTP/{request.version}"
        response = library.accept(Handshake(request.target, headers, request.method, version))
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            self._write_and_drop(response.serialize())
            return
        self.transport.write(response.serialize())
        self._open(library.subprotocol)

    def _open(self, subprotocol: str | None) -> None:
        assert self.visitor is not None
        assert self._timer is not None
        assert self._early is not None
        self._timer.cancel()
        self._hold(0)
        opened = Socket(self._endpoint, self.transport, self._below, self.visitor, subprotocol)
        self._endpoint.connections.remove(self)
        self._endpoint.connections.add(opened)
        self.transport.set_protocol(opened)
        opened.begin(self._early)


class _Tls(SSLProtocol):
    """TLS with a small read buffer; asyncio's has a quarter of a megabyte.

    This module makes it, as asyncio would report a connection only after the TLS handshake: until
    then the connection would not count.
    """

    max_size = READ_SIZE

    def __init__(self, endpoint: Endpoint, exchange: Exchange, context: ssl.SSLContext) -> None:
        handshake: asyncio.Future[None] = endpoint.loop.create_future()
        handshake.add_done_callback(exchange.tls_ready)
        super().__init__(
            endpoint.loop,
            exchange,
            context,
            handshake,
            server_side=True,
            ssl_handshake_timeout=endpoint.settings.open_timeout,  # type: ignore[arg-type]
        )
        self._exchange: Exchange | None = exchange

    def connection_made(self, transport: typing.Any) -> None:
        """Count the connection, and begin the TLS handshake."""
        assert self._exchange is not None
        self._exchange.arrive(transport)
        self._exchange = None  # a WebSocket replaces the exchange later
        super().connection_made(transport)


def _keep(few: dict[Exchange, None], exchange: Exchange, most: int) -> None:
    """Add a connection; abort the oldest of more than ``most``."""
    few[exchange] = None
    if len(few) > most:
        first = next(iter(few))
        del few[first]
        first.abort()


def _choose(spoken: Sequence[str], offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Return the first spoken subprotocol that the client offers, if it offers one."""
    return next((Subprotocol(own) for own in spoken if own in offered), None)


def _refusal(denied: Denied) -> bytes:
    return respond(denied.status, denied.message, headers=denied.headers).encode()
