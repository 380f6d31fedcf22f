"""Connections from accept to the response of their request.

A connection begins as an :class:`Exchange`: one HTTP request and its response. Where the request
opens a WebSocket, a :class:`~wsserver.websocket.Socket` replaces the exchange.
"""

import asyncio
import functools
import ssl
import typing
from asyncio.sslproto import SSLProtocol
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus

from websockets.datastructures import Headers
from websockets.http11 import Request as Handshake
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from wsserver.admission import Denied, Visitor, no_memory
from wsserver.http import BadRequest, HeadParser
from wsserver.peers import ELSEWHERE, NOBODY, established, user_at
from wsserver.responses import Answer, Request, Response, Upgrade, respond
from wsserver.websocket import READ_SIZE, SILENT, Place, Socket, Wire, half_close

__all__ = ["Exchange", "Host", "Tls"]

REQUEST_COST = 8192  # bytes in memory of a request besides its head, until the response
HEADER_COST = 512  # bytes in memory of each line of a head besides its text
LINGER = 1.0  # seconds for a refused client to read the response


class Host(Place, typing.Protocol):
    """The part of :class:`~wsserver.listener.Listener` that an exchange uses."""

    answer: Callable[[Request, Visitor | None], Awaitable[Answer]]
    on_denied: Callable[[Denied, str, Mapping[str, str]], None] | None
    tls: ssl.SSLContext | None
    turned_away: dict["Exchange", None]
    spare: dict["Exchange", None]
    answering: set[asyncio.Task[None]]
    closing: bool

    def turn_away(self, exchange: "Exchange", denied: Denied, peer: str) -> None:
        """Keep a refused connection for a moment."""

    def take_spare(self, exchange: "Exchange") -> None:
        """Note a connection in a place for probes."""


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

    _listener: Host

    def __init__(self, listener: Host) -> None:
        super().__init__(listener)
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
        listener = self._listener
        self.transport = transport
        listener.connections.add(self)
        name = transport.get_extra_info("peername")
        here = transport.get_extra_info("sockname")
        # A client of a unix socket may have a name. A client that has gone has no address.
        peer = name[0] if isinstance(name, tuple) else "gone" if isinstance(here, tuple) else "unix"
        try:
            if listener.admission is not None:
                matters = listener.admission.users is not None and isinstance(name, tuple)
                user = user_at(name, here) if matters else None
                # Checked after the user: a client that has just closed is not elsewhere.
                if user == ELSEWHERE and not established(transport.get_extra_info("socket")):
                    user = NOBODY
                self.visitor = listener.admission.arrive(peer, user)
                if self.visitor.spare:
                    listener.take_spare(self)
        except Denied as denied:
            self._denied = denied
            self._timer = listener.loop.call_later(LINGER, self.abort)
            listener.turn_away(self, denied, peer)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request, or refuse the connection at once."""
        transport = typing.cast("asyncio.Transport", transport)  # uvloop's are no subclass
        if self._listener.tls is None:
            self.arrive(transport)
        else:
            self._below, self.transport = self.transport, transport
            transport.set_read_buffer_limits(READ_SIZE)  # type: ignore[attr-defined]
        if self._denied is None:
            timeout = self._listener.settings.open_timeout
            self._timer = self._listener.loop.call_later(timeout, self.abort)
        else:
            denied = self._denied
            self._write_and_drop(_refusal(denied))

    def tls_ready(self, tls: "asyncio.Future[None]") -> None:
        """The TLS handshake finished or failed. No other callback reports a failure."""
        if tls.cancelled() or tls.exception() is not None or self._below is None:
            self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. A task that answers its request goes on."""
        self._listener.turned_away.pop(self, None)
        self._listener.spare.pop(self, None)
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
        data = bytes(self._listener.buffer[:size])
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
            task = self._listener.loop.create_task(self._answer(request))
            self._listener.answering.add(task)
            task.add_done_callback(self._listener.answering.discard)

    def _deny(self, denied: Denied) -> None:
        """Refuse the connection after its head has come."""
        if self._listener.on_denied is not None and self.visitor is not None:
            self._listener.on_denied(denied, self.visitor.address, {})
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
            async with asyncio.timeout(self._listener.settings.open_timeout):
                answer = await self._listener.answer(request, self.visitor)
        except TimeoutError:
            return  # the timer aborts the connection at the same time
        finally:
            self._answering = False
            if self not in self._listener.connections:
                self._hold(0)
        if self.transport.is_closing() or self._early is None:  # gone, or answered
            return
        if isinstance(answer, Response):
            self._write_and_drop(answer.encode())
        elif self._listener.closing:
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
        opened = Socket(self._listener, self.transport, self._below, self.visitor, subprotocol)
        self._listener.connections.remove(self)
        self._listener.connections.add(opened)
        self.transport.set_protocol(opened)
        opened.begin(self._early)


class Tls(SSLProtocol):
    """TLS with a small read buffer; asyncio's has a quarter of a megabyte.

    This module makes it, as asyncio would report a connection only after the TLS handshake: until
    then the connection would not count.
    """

    max_size = READ_SIZE

    def __init__(self, listener: Host, exchange: Exchange, context: ssl.SSLContext) -> None:
        handshake: asyncio.Future[None] = listener.loop.create_future()
        handshake.add_done_callback(exchange.tls_ready)
        super().__init__(
            listener.loop,
            exchange,
            context,
            handshake,
            server_side=True,
            ssl_handshake_timeout=listener.settings.open_timeout,  # type: ignore[arg-type]
        )
        self._exchange: Exchange | None = exchange

    def connection_made(self, transport: typing.Any) -> None:
        """Count the connection, and begin the TLS handshake."""
        assert self._exchange is not None
        self._exchange.arrive(transport)
        self._exchange = None  # a WebSocket replaces the exchange later
        super().connection_made(transport)


def _choose(spoken: Sequence[str], offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Return the first spoken subprotocol that the client offers, if it offers one."""
    return next((Subprotocol(own) for own in spoken if own in offered), None)


def _refusal(denied: Denied) -> bytes:
    return respond(denied.status, denied.message, headers=denied.headers).encode()
