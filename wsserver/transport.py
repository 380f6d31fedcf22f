"""The way to a client, from accept to close, over the WebSocket library's protocol without I/O.

A connection begins as an :class:`Exchange`: a request over HTTP and its answer. Where that is the
opening of a WebSocket, a :class:`Socket` takes over, and nothing else is kept of it. A socket has
no task: it writes without waiting, and hands over what comes in the call that brings it.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
import typing
from asyncio.sslproto import SSLProtocol
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from uuid import UUID

from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import Protocol, Side, State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from wsserver.admission import Admission, Denied, Visitor, no_memory
from wsserver.descriptors import AT_ONCE, OPERATORS, SPARE, lingering
from wsserver.limits import Account, Bucket, Memory, held
from wsserver.listening import Acceptor, bound, user_at
from wsserver.logs import log
from wsserver.protocol import SUBPROTOCOL, Close
from wsserver.responses import method_not_allowed, respond
from wsserver.settings import Settings
from wsserver.telemetry import Aborted, Metrics

__all__ = ["Endpoint", "Exchange", "Receiver", "Socket", "frame"]

# To the library a handshake that came to nothing is an error, and any stranger can make one.
_SILENT = logging.getLogger("wsserver.websockets")
_SILENT.setLevel(logging.CRITICAL)

# Data that the kernel takes before it has sent what it has: little, so that a slow reader is
# noticed here, where its text can be merged, and a stop need not wait behind it.
UNSENT_IN_KERNEL = 16384
READ_SIZE = 8192  # bytes taken from one socket before others get their turn
BITE = 512  # of them that are parsed at once, and
FRAMES_PER_TURN = 16  # frames after which the rest waits for a later turn
FRAGMENTS = 256  # of one message, as even those without data take time
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

_OPERATORS: Account = ("operators",)  # who are asked for no address
_OTHER_METHODS = (b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"OPTIONS ", b"TRACE ", b"CONNECT ")


class Receiver(typing.Protocol):
    """What serves one WebSocket."""

    def receive(self, message: str | bytes) -> None:
        """Take a message."""

    def wake(self) -> None:
        """Go on writing, as the peer has caught up."""


class Endpoint:
    """Where clients connect, and what all their connections have in common.

    Args:
        settings: the times and limits that hold here.
        answer: answers a request; None lets a WebSocket begin.
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
        answer: Callable[[Visitor | None, Request], Awaitable[Response | None]],
        memory: Memory,
        *,
        admission: Admission | None = None,
        on_denied: Callable[[Denied, str, Mapping[str, str]], None] | None = None,
        on_open: Callable[["Socket"], "Receiver"] | None = None,
        on_close: Callable[["Socket"], None] | None = None,
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


class _Wire(asyncio.BufferedProtocol):
    """What a connection is in either of its phases.

    Attributes:
        transport: what it writes to.
        visitor: what is known of the client; None where nobody asks.
    """

    __slots__ = ("_account", "_closed", "_endpoint", "_held", "transport", "visitor")

    transport: asyncio.Transport
    visitor: Visitor | None

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._closed: asyncio.Future[None] | None = None
        self._held = 0  # bytes that are counted for it,
        self._account = _OPERATORS  # and for whom

    def get_buffer(self, _: int) -> memoryview:
        """Tell where to read to; see :attr:`Endpoint.buffer`."""
        return self._endpoint.buffer

    def _hold(self, size: int) -> bool:
        """Count the bytes that are kept of it now; False, and nothing changed, if it may not."""
        memory, more = self._endpoint.memory, size - self._held
        if not self._held and self.visitor is not None:
            self._account = self.visitor.account
        if more > 0 and not memory.take(self._account, more):
            return False
        memory.give(self._account, -more)
        self._held = size
        return True

    def abort(self) -> None:
        """Cut the connection. What is unsent is lost."""
        self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        """Forget the connection."""
        self._endpoint.connections.discard(self)
        if self.visitor is not None and self._endpoint.admission is not None:
            self._endpoint.admission.depart(self.visitor)
        if self._closed is not None:
            self._closed.set_result(None)

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        if self in self._endpoint.connections:
            self._closed = self._closed or self._endpoint.loop.create_future()
            await asyncio.shield(self._closed)


class Exchange(_Wire):
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

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.visitor = None
        self._denied: Denied | None = None
        self._below: asyncio.Transport | None = None  # what TLS writes to, if there is TLS
        self._timer: asyncio.TimerHandle | None = None
        self._http = ServerProtocol(select_subprotocol=_select_subprotocol, logger=_SILENT)
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

    def shaken(self, tls: "asyncio.Future[None]") -> None:
        """TLS is there, or will not be: of the latter nobody else tells."""
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
            _flush(self._http, self.transport)  # as where it is not understood
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
                assert isinstance(request, Request)
                self._take(request)

    def _take(self, request: Request) -> None:
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
        _flush(self._http, self.transport)

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
        self.transport.write(response.serialize())
        if self.transport.can_write_eof():
            _half_close(self.transport)
        self._drop()

    async def _answer(self, request: Request) -> None:
        try:
            async with asyncio.timeout(self._endpoint.settings.open_timeout):
                response = await self._endpoint.answer(self.visitor, request)
        except TimeoutError:
            return  # and nobody is there any more
        finally:
            self._answering = False
            if self not in self._endpoint.connections:
                self._hold(0)
        if self.transport.is_closing() or self._early is None:  # gone, or answered already
            return
        if response is None:
            response = self._http.accept(request)
        if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS and self._endpoint.closing:
            why = "Server is shutting down.\n"
            response = self._http.reject(HTTPStatus.SERVICE_UNAVAILABLE, why)
        self._http.send_response(response)
        _flush(self._http, self.transport)
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


class Socket(_Wire):
    """A WebSocket with synchronous writes, and a deadline for those who do not read.

    Keep-alive pings do not notice a peer that stopped reading, since they wait for their turn
    behind what that peer does not read.

    Args:
        endpoint: where the client connected.
        transport: what it is to write to.
        below: what TLS writes to, if there is TLS.
        visitor: what is known of the client.
        subprotocol: the one that the handshake agreed on; None where the client offered none.

    Attributes:
        began: when it was opened, by the event loop's clock.
    """

    __slots__ = (
        "_below",
        "_connection",
        "_control",
        "_deadline",
        "_failed",
        "_leaving",
        "_message",
        "_parts",
        "_ping",
        "_pinged",
        "_protocol",
        "_text",
        "_timer",
        "_unread",
        "_unsent",
        "began",
        "subprotocol",
    )

    visitor: Visitor

    def __init__(
        self,
        endpoint: Endpoint,
        transport: asyncio.Transport,
        below: asyncio.Transport | None,
        visitor: Visitor,
        subprotocol: str | None = None,
    ) -> None:
        super().__init__(endpoint)
        settings = endpoint.settings
        self.transport = transport
        self.visitor = visitor
        self.subprotocol = subprotocol
        self.began = endpoint.loop.time()
        # A new one, as the one that made the handshake would keep the request.
        self._protocol = Protocol(Side.SERVER, max_size=settings.message_size, logger=_SILENT)
        self._below = below
        self._unread = b""  # the rest of what came, for later turns
        # Of a message in fragments: what came of it, in how many, and whether it is text.
        self._message: bytearray | None = None
        self._parts = 0
        self._text = False
        self._control: Bucket | None = None  # of frames that nobody asked for and are no messages
        self._deadline: asyncio.TimerHandle | None = None  # for the peer to read something
        self._unsent = 0  # when the deadline was set, and what was written since
        self._ping: bytes | None = None  # that is not answered yet
        self._pinged = self.began
        self._leaving = False  # it is being closed,
        self._failed = False  # and nothing more is heard
        # Of the next look at the pings; of one that is being closed, its last moment.
        self._timer = endpoint.loop.call_later(settings.ping_interval, self._keep_alive)
        transport.set_write_buffer_limits(settings.write_buffer)
        if below is not None:
            below.set_write_buffer_limits(UNSENT_IN_KERNEL)
        _limit_unsent(transport.get_extra_info("socket"))
        assert endpoint.on_open is not None
        self._connection = endpoint.on_open(self)

    @property
    def id(self) -> UUID:
        """What the log calls it."""
        return self._protocol.id

    @property
    def open(self) -> bool:
        """Whether neither side has begun to close it."""
        return not (self._leaving or self.transport.is_closing())

    @property
    def writable(self) -> bool:
        """Whether the peer keeps up."""
        return self._deadline is None and not self.transport.is_closing()

    @property
    def closed_by_client(self) -> bool:
        """Whether a close frame of the client has come: the client knows that it is not connected.

        A TCP connection that ends without one may have been ended by anybody on the way.
        """
        return self._protocol.close_rcvd is not None

    @property
    def ended_with(self) -> int:
        """The close code of whoever closed first, once it is closed; 1006 where nobody did.

        The library's is 1006 also for one that was told to go and did so without an answer.
        """
        protocol = self._protocol
        first = protocol.close_rcvd if protocol.close_rcvd_then_sent else protocol.close_sent
        return 1006 if first is None else first.code

    # What is written.

    def write(self, text: bytes) -> None:
        """Send a text message of UTF-8, at once or from a buffer, without waiting."""
        if self._leaving or self.transport.is_closing():
            return
        if self._deadline is not None:
            self._unsent += len(text)
        self.transport.write(frame(text))
        if self._deadline is not None:
            self._check_unsent()
            self._count()

    def end(self, code: int, reason: str = "") -> None:
        """Begin to close, after all that was written before."""
        if self.open:
            self._protocol.send_close(code, reason)
            self._send()

    def _fail(self, code: int, reason: str) -> None:
        """Close on one who cannot be served any further, and hear nothing more from it."""
        self._failed = True
        self._protocol.fail(code, reason)
        self._send()

    def _send(self) -> None:
        """Write what the library has to say, and give one who is to go the time to do so."""
        _flush(self._protocol, self.transport)
        if self._protocol.state is not State.OPEN and not self._leaving:
            self._leaving = True
            self._timer.cancel()
            timeout = self._endpoint.settings.send_timeout
            self._timer = self._endpoint.loop.call_later(timeout, self.abort)

    def pause_writing(self) -> None:
        """The peer falls behind: from now on it has to read something within the deadline."""
        self._set_deadline()
        self._count()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._count()
        if self.open:
            self._connection.wake()

    def _set_deadline(self) -> None:
        self._unsent = self._waiting()
        timeout = self._endpoint.settings.send_timeout
        self._deadline = self._endpoint.loop.call_later(timeout, self._check_progress)

    def _check_progress(self) -> None:
        if self._waiting() < self._unsent:
            self._set_deadline()  # slow, but alive
        else:
            self._abort_reader("does not read")

    def _check_unsent(self) -> None:
        if self._waiting() > self._endpoint.settings.max_unsent and not self.transport.is_closing():
            self._abort_reader("too much unsent")

    def _waiting(self) -> int:
        """Return how many bytes the kernel has not taken yet."""
        below = 0 if self._below is None else self._below.get_write_buffer_size()
        return self.transport.get_write_buffer_size() + below

    def _abort_reader(self, why: Aborted) -> None:
        log.info("reader aborted", socket=self.id, reason=why)
        assert self._endpoint.metrics is not None
        self._endpoint.metrics.reader_aborted(why)
        self.abort()

    # What is read.

    def buffer_updated(self, size: int) -> None:
        """Take what came; of a flood of tiny frames some, and the rest in turn with others."""
        self._unread += self._endpoint.buffer[:size]
        self._read(FRAMES_PER_TURN)
        self._count()
        if self._unread or size == READ_SIZE:  # uvloop would read on in the same turn
            self.transport.pause_reading()
            self._endpoint.loop.call_soon(self._read_on)

    def begin(self, early: bytes) -> None:
        """Read what came before the handshake was answered, and then go on."""
        if early:
            self._unread = early
            self.transport.pause_reading()
            self._endpoint.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._read(FRAMES_PER_TURN)
        self._count()
        if self._unread:
            self._endpoint.loop.call_soon(self._read_on)
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def _read(self, most: int) -> None:
        """Take what is unread, up to so many frames."""
        frames = 0
        while self._unread and frames < most and not self.transport.is_closing():
            bite, self._unread = self._unread[:BITE], self._unread[BITE:]
            self._protocol.receive_data(bite)
            self._send()
            # Pongs are written whether or not the peer reads them.
            self._check_unsent()
            for event in self._protocol.events_received():
                if not self._failed:
                    assert isinstance(event, Frame)
                    self._take(event)
                frames += 1
        if self.transport.is_closing():
            self._unread = b""  # as nobody is there any more to whom it could matter

    def _count(self) -> None:
        """Count what is kept of what the peer sent and did not read.

        Where there is no memory for it, the connection ends: nothing of it can be given up.
        """
        unsent, unparsed = self._waiting(), self._protocol.reader.buffer
        size = unsent
        for kept in (self._unread, unparsed, self._message):
            if kept:
                size += held(kept)
        if self._hold(size) or self.transport.is_closing():
            return
        self._unread, self._message = b"", None
        if unsent > self._endpoint.settings.write_buffer:
            self._abort_reader("too much unsent")
        elif not self._failed:
            self._fail(Close.TRY_AGAIN_LATER, "too little memory")

    def eof_received(self) -> None:
        """Close, after what came and what was written before."""
        self._read(len(self._unread))  # behind TLS the end can come with it, in one turn
        self._protocol.receive_eof()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._timer.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)
        self._hold(0)
        assert self._endpoint.on_close is not None
        self._endpoint.on_close(self)

    def _take(self, part: Frame) -> None:
        """Take a frame, and hand over the message that it ends."""
        if part.opcode in {Opcode.PING, Opcode.PONG}:
            self._take_control(part)
        elif part.opcode is Opcode.CLOSE:
            pass  # which the library has answered
        elif part.fin and self._message is None:
            self._take_message(part.data, text=part.opcode is Opcode.TEXT)
        else:
            self._take_fragment(part)

    def _take_fragment(self, part: Frame) -> None:
        """Add a fragment to its message, and hand over the message that it ends."""
        if self._message is None:
            self._message, self._parts, self._text = bytearray(), 0, part.opcode is Opcode.TEXT
        self._message += part.data
        self._parts += 1
        if part.fin:
            message, self._message = bytes(self._message), None
            self._take_message(message, text=self._text)
        elif self._parts >= FRAGMENTS:
            self._message = None
            self._fail(Close.MESSAGE_TOO_BIG, "too many fragments")

    def _take_message(self, data: bytes | bytearray | memoryview, *, text: bool) -> None:
        try:
            message = str(data, "utf-8") if text else bytes(data)
        except UnicodeDecodeError as error:
            self._fail(Close.INVALID_DATA, f"{error.reason} at position {error.start}")
        else:
            self._receive(message)

    def _receive(self, message: str | bytes) -> None:
        try:
            self._connection.receive(message)
        except Exception as error:  # noqa: BLE001
            log.error("connection failed", socket=self.id, failure=error)
            self._fail(Close.INTERNAL_ERROR, "")

    def _take_control(self, part: Frame) -> None:
        """Note an answer to a ping, and see that there are not too many frames of other kinds.

        Each ping costs an answer, and none is seen by whoever counts messages.
        """
        if part.opcode is Opcode.PONG and part.data == self._ping:
            self._ping = None
            return
        settings, now = self._endpoint.settings, self._endpoint.loop.time()
        if self._control is None:
            self._control = Bucket(settings.frame_rate, settings.frame_burst, now)
        if self._control.take(now) and not self._leaving:
            # Not the closing handshake, as that would go on to read and to answer.
            self._fail(Close.POLICY_VIOLATION, "too many pings")

    # Whether the peer is there.

    def _keep_alive(self) -> None:
        """Ping the peer when it is time to, and close on one who has not answered in time."""
        interval = self._endpoint.settings.ping_interval
        timeout = self._endpoint.settings.ping_timeout
        now = self._endpoint.loop.time()
        quiet = now - self._pinged
        if not self.writable:  # a ping would have to wait; it is the send deadline that counts
            self._pinged, quiet = now, 0.0
        elif self._ping is not None and quiet >= timeout:
            self._fail(Close.INTERNAL_ERROR, "keepalive ping timeout")
            return
        elif self._ping is None and quiet >= interval:
            self._ping = secrets.token_bytes(4)
            self._pinged, quiet = now, 0.0
            self._protocol.send_ping(self._ping)
            self._send()
        wait = interval - quiet if self._ping is None else min(interval, timeout - quiet)
        self._timer = self._endpoint.loop.call_later(wait, self._keep_alive)


class _Tls(SSLProtocol):
    """TLS that takes little at once, and keeps little: asyncio's takes a quarter of a megabyte.

    It is put before a connection here and not by asyncio, which would tell of that only after the
    handshake of TLS: until then nobody would count it.
    """

    max_size = READ_SIZE

    def __init__(self, endpoint: Endpoint, exchange: Exchange, context: ssl.SSLContext) -> None:
        shaken: asyncio.Future[None] = endpoint.loop.create_future()
        shaken.add_done_callback(exchange.shaken)
        super().__init__(
            endpoint.loop,
            exchange,
            context,
            shaken,
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


def frame(text: bytes) -> bytes:
    """Return a text message as a server sends it: one frame, not masked (RFC 6455 section 5.2)."""
    size = len(text)
    if size < 126:  # noqa: PLR2004
        return b"\x81" + size.to_bytes() + text
    if size < 65536:  # noqa: PLR2004
        return b"\x81\x7e" + size.to_bytes(2) + text
    return b"\x81\x7f" + size.to_bytes(8) + text


def _flush(protocol: Protocol, transport: asyncio.Transport) -> None:
    """Write what the library has to say, unless nobody is left to hear it."""
    for data in protocol.data_to_send():
        if transport.is_closing():
            return
        if data:
            transport.write(data)
        elif transport.can_write_eof():
            _half_close(transport)
        else:
            transport.close()


def _half_close(transport: asyncio.Transport) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # the peer has gone
        transport.write_eof()


def _limit_unsent(sock: socket.socket) -> None:
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and sock.family != getattr(socket, "AF_UNIX", None):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, UNSENT_IN_KERNEL)


def _select_subprotocol(_: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # A client that offers none, or others, is served all the same: most offer none.
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None
