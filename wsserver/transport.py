"""Connections from accept to the answer of their request.

A connection begins as an :class:`Exchange`: a request over HTTP and its answer. Where that is the
opening of a WebSocket, a :class:`~wsserver.websocket.Socket` takes over, and nothing else is kept.
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
from websockets.http11 import Response as Reply
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from wsserver.admission import Admission, Denied, Visitor, no_memory
from wsserver.descriptors import AT_ONCE, OPERATORS, SPARE, lingering
from wsserver.limits import Memory
from wsserver.listening import ELSEWHERE, NOBODY, Acceptor, bound, established, user_at
from wsserver.responses import Answer, Request, Response, method_not_allowed, respond
from wsserver.settings import Settings
from wsserver.telemetry import Metrics
from wsserver.websocket import READ_SIZE, SILENT, Receiver, Socket, Wire, flush, half_close

__all__ = ["Endpoint", "Exchange"]

HEAD_SIZE = 32_768  # bytes of a request's head, as nginx and others have it
REQUEST_COST = 8192  # bytes in memory of a request besides its head, while it is answered
HEADER_COST = 512  # bytes in memory of each line of a head besides its text
LIST_ITEMS = 64  # of a header that is a list, over all its lines
LISTS = (  # which are taken apart here or by the library
    "Connection",
    "Upgrade",
    "Sec-WebSocket-Extensions",
    "Sec-WebSocket-Protocol",
    "X-Forwarded-For",
    "If-None-Match",
)
LINGER = 1.0  # seconds for one who is turned away at the door to read why

_OTHER_METHODS = (b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"OPTIONS ", b"TRACE ", b"CONNECT ")


class Endpoint:
    """Where clients connect, and what all their connections have in common.

    Args:
        settings: the times and limits that hold here.
        answer: answers a request, or lets it open a WebSocket.
        memory: what counts the bytes that are kept of what clients send and do not read.
        admission: who may connect at all; without it, everyone may.
        on_denied: told why, where one may not.
        on_open: makes what serves a WebSocket.
        on_close: told when a WebSocket has ended.
        metrics: what learns of readers that were aborted.
        tls: what a TLS handshake takes; None where there is to be none.

    Attributes:
        connections: all that there are, those included that are no WebSockets yet, or never.
        turned_away: those of them that may not be; the first of them first.
        spare: those of them that have a place for probes; the first of them first.
        answering: the tasks that answer requests, perhaps of clients who have gone.
        closing: whether no WebSocket begins any more.
        buffer: what all connections read into. Each takes its data from it in the callback that
            says it is there, before any other can read, whichever the event loop.
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
        """The sockets that listen."""
        return [acceptor.sock for acceptor in self._acceptors]

    async def bind(self, where: socket.socket | tuple[str, int]) -> None:
        """Take a host and port, or a socket that is bound already; it is not served yet.

        Raises:
            OSError: the address cannot be had.
        """
        for sock in await bound(*where) if isinstance(where, tuple) else [where]:
            self._acceptors.append(Acceptor(sock, self._protocol, self._full))

    def serve(self) -> None:
        """Begin to accept connections at all that was bound."""
        for acceptor in self._acceptors:
            acceptor.start()

    def stop_listening(self) -> None:
        """Accept no more connections, and let no more WebSockets begin on those that there are."""
        self.closing = True
        for acceptor in self._acceptors:
            acceptor.close()

    def abort(self) -> None:
        """Cut all connections."""
        for task in self.answering:
            task.cancel()
        for connection in tuple(self.connections):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until all connections have ended."""
        ended = (connection.wait_closed() for connection in self.connections)
        await asyncio.gather(*self.answering, *ended, return_exceptions=True)

    def turn_away(self, exchange: "Exchange", denied: Denied, peer: str) -> None:
        """Note one that may not be here; if they become many, the first of them goes."""
        assert self.on_denied is not None
        self.on_denied(denied, peer, {})
        _keep(self.turned_away, exchange, self._lingering)

    def take_spare(self, exchange: "Exchange") -> None:
        """Note one that has a place for probes; if they become many, the first of them goes."""
        _keep(self.spare, exchange, SPARE)

    def _full(self) -> bool:
        """Whether more connections would take descriptors that others need."""
        if self.admission is None:
            return len(self.connections) >= OPERATORS
        beside = SPARE + self._lingering + AT_ONCE
        return len(self.connections) >= self.settings.connections + beside

    def _protocol(self) -> asyncio.BaseProtocol:
        exchange = Exchange(self)
        return exchange if self.tls is None else _Tls(self, exchange, self.tls)


class Exchange(Wire):
    """A request and its answer. If it is for a WebSocket, that begins; all others end with it."""

    __slots__ = (
        "_answering",
        "_below",
        "_denied",
        "_early",
        "_head_ended",
        "_http",
        "_lines",
        "_size",
        "_tail",
        "_timer",
    )

    _endpoint: Endpoint

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.visitor = None
        self._denied: Denied | None = None
        self._below: asyncio.Transport | None = None  # what TLS writes to, if there is TLS
        self._timer: asyncio.TimerHandle | None = None
        self._http = ServerProtocol(logger=SILENT)
        self._tail = b""  # the end of what came of the request so far
        self._size = self._lines = 0  # of the request's head so far
        self._head_ended = False
        self._answering = False  # which may last longer than the connection
        # Frames that came before the answer, until that is there; None: what comes is dropped.
        self._early: bytes | None = b""

    def arrive(self, transport: asyncio.Transport) -> None:
        """Count the connection. Those with TLS are counted before its handshake too."""
        endpoint = self._endpoint
        self.transport = transport
        endpoint.connections.add(self)
        name = transport.get_extra_info("peername")
        here = transport.get_extra_info("sockname")
        # A unix socket's clients may have names; a client that has gone has none.
        peer = name[0] if isinstance(name, tuple) else "gone" if isinstance(here, tuple) else "unix"
        try:
            if endpoint.admission is not None:
                matters = endpoint.admission.users is not None and isinstance(name, tuple)
                user = user_at(name, here) if matters else None
                # Asked after the user: who has just left is not elsewhere.
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
        """Expect a request, or tell at once why there is to be none."""
        transport = typing.cast("asyncio.Transport", transport)  # not all are derived from it
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
            self._answer_and_drop(respond(denied.status, denied.message, headers=denied.headers))

    def tls_ready(self, tls: "asyncio.Future[None]") -> None:
        """The TLS handshake finished or failed. No other callback reports a failure."""
        if tls.cancelled() or tls.exception() is not None or self._below is None:
            self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. Who answers its request may have to see that through."""
        self._endpoint.turned_away.pop(self, None)
        self._endpoint.spare.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        if not self._answering:
            self._hold(0)

    def buffer_updated(self, size: int) -> None:
        """Feed the library, and have what it understands answered."""
        data = self._of_request(bytes(self._endpoint.buffer[:size]))
        if data:
            self._http.receive_data(data)
            flush(self._http, self.transport)  # as where it is not understood
            if self._http.handshake_exc is not None:
                self._head_ended = True
                self._drop()
        if self._early is None:
            return
        cost = REQUEST_COST + HEADER_COST * self._lines
        if not self._hold(cost + self._size + len(self._early)):
            self._deny(no_memory())
        elif self._size > HEAD_SIZE:
            why = f"The head of the request has more than {HEAD_SIZE} bytes."
            self._answer_and_drop(respond(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, why))
        else:
            for request in self._http.events_received():
                assert isinstance(request, Handshake)
                self._take(request)

    def _take(self, request: Handshake) -> None:
        """Have a request answered, unless it costs too much to look into."""
        for name in LISTS:
            values = request.headers.get_all(name)
            if sum(value.count(",") + value.count(";") for value in values) >= LIST_ITEMS:
                why = f"The header {name} has more than {LIST_ITEMS} items."
                self._answer_and_drop(respond(HTTPStatus.BAD_REQUEST, why))
                return
        self._answering = True
        task = self._endpoint.loop.create_task(self._answer(request))
        self._endpoint.answering.add(task)
        task.add_done_callback(self._endpoint.answering.discard)

    def _deny(self, denied: Denied) -> None:
        """Answer that this one may not be here."""
        if self._endpoint.on_denied is not None and self.visitor is not None:
            self._endpoint.on_denied(denied, self.visitor.address, {})
        self._answer_and_drop(respond(denied.status, denied.message, headers=denied.headers))

    def eof_received(self) -> None:
        """Close, as who asks has gone."""
        self._http.receive_eof()
        flush(self._http, self.transport)

    def _of_request(self, data: bytes) -> bytes:
        """Return what belongs to the head of the request, and keep what comes after it.

        That may be frames of a WebSocket whose client does not wait for the answer.
        """
        if self._head_ended:
            self._keep(data)
            return b""
        if not self._tail and data.startswith(_OTHER_METHODS):
            # The library hangs up on requests with a body. So this one is answered here.
            self._answer_and_drop(method_not_allowed())
            return b""
        known = len(self._tail)
        head = self._tail + data
        end = head.find(b"\r\n\r\n")
        if end >= 0:
            self._head_ended = True
            data, early = head[known : end + 4], head[end + 4 :]
            self._keep(early)
        self._tail = head[-3:]
        self._size += len(data)
        self._lines += data.count(b"\n")
        return data

    def _keep(self, data: bytes) -> None:
        """Keep what comes before the answer, and read no more of it than fits the buffer."""
        if self._early is not None and data:
            self._early += data
            if len(self._early) >= READ_SIZE:
                self.transport.pause_reading()

    def _drop(self) -> None:
        """Read and drop what still comes: there will be no WebSocket."""
        early, self._early = self._early, None
        self._hold(0)
        if early and not self.transport.is_closing():
            self.transport.resume_reading()

    def _answer_and_drop(self, response: Response) -> None:
        """Answer without the library.

        What follows is read and dropped until the peer has gone or the time for it is up: to close
        on unread data would reset the connection, and take the answer with it.
        """
        self._head_ended = True
        self.transport.write(response.encode())
        if self.transport.can_write_eof():
            half_close(self.transport)
        self._drop()

    async def _answer(self, handshake: Handshake) -> None:
        request = Request(handshake.method, handshake.path, _lower(handshake))
        try:
            async with asyncio.timeout(self._endpoint.settings.open_timeout):
                answer = await self._endpoint.answer(request, self.visitor)
        except TimeoutError:
            return  # the client has gone, or its connection is aborted at the same time
        finally:
            self._answering = False
            if self not in self._endpoint.connections:
                self._hold(0)
        if self.transport.is_closing() or self._early is None:  # gone, or answered already
            return
        if isinstance(answer, Response):
            response = _reply(answer)
        else:
            # A bound method would keep this exchange alive in a reference cycle.
            choose = functools.partial(_choose, answer.subprotocols)
            self._http.select_subprotocol = choose  # type: ignore[method-assign]
            response = self._http.accept(handshake)
        if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS and self._endpoint.closing:
            why = "Server is shutting down.\n"
            response = self._http.reject(HTTPStatus.SERVICE_UNAVAILABLE, why)
        self._http.send_response(response)
        flush(self._http, self.transport)
        if self._http.state is State.OPEN:
            self._open()
        else:
            self._drop()

    def _open(self) -> None:
        assert self.visitor is not None
        assert self._timer is not None
        assert self._early is not None
        self._timer.cancel()
        self._hold(0)
        opened = Socket(
            self._endpoint, self.transport, self._below, self.visitor, self._http.subprotocol
        )
        self._endpoint.connections.remove(self)
        self._endpoint.connections.add(opened)
        self.transport.set_protocol(opened)
        opened.begin(self._early)


class _Tls(SSLProtocol):
    """TLS that takes little at once, and keeps little: asyncio's takes a quarter of a megabyte.

    It is put before a connection here and not by asyncio, which would tell of that only after the
    handshake of TLS: until then nobody would count it.
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
        """Have the connection counted, and begin the handshake."""
        assert self._exchange is not None
        self._exchange.arrive(transport)
        self._exchange = None  # which is not kept beyond its time
        super().connection_made(transport)


def _keep(few: dict[Exchange, None], exchange: Exchange, most: int) -> None:
    """Add one to those that may stay a moment; the first goes, who has had most time."""
    few[exchange] = None
    if len(few) > most:
        first = next(iter(few))
        del few[first]
        first.abort()


def _choose(spoken: Sequence[str], offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Return the first spoken subprotocol that the client offers, if it offers one."""
    return next((Subprotocol(own) for own in spoken if own in offered), None)


def _reply(response: Response) -> Reply:
    """Return a response as the library has it."""
    status = response.status
    return Reply(status.value, status.phrase, Headers(response.headers), response.body)


def _lower(request: Handshake) -> dict[str, str]:
    """Return the headers of a request by their names in lower case, repeated ones as one list."""
    headers: dict[str, str] = {}
    for given, value in request.headers.raw_items():
        name = given.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
