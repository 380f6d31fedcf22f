"""One HTTP request of a client and its response.

A connection begins as an :class:`Exchange`. After the request, the connection closes, or another
protocol takes it over: a :class:`~wsserver.sockets.websocket.Socket`, a
:class:`~wsserver.sockets.streaming.StreamedResponse`, or the exchange of the next request.
"""

import asyncio
import functools
import ssl
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus

from websockets.datastructures import Headers
from websockets.http11 import Request as Handshake
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from wsserver.admission import Visitor
from wsserver.denials import Denied, no_memory
from wsserver.responses import (
    BODY_RATE,
    Answer,
    BadRequest,
    Request,
    Response,
    Stream,
    Upgrade,
    respond,
    too_large,
    too_slow,
)
from wsserver.sockets.http import RequestParser
from wsserver.sockets.peers import ELSEWHERE, NOBODY, established, user_at
from wsserver.sockets.streaming import StreamedResponse
from wsserver.sockets.tcp import READ_SIZE, TcpConnection, half_close
from wsserver.sockets.websocket import SILENT, Socket, WebSocketListener

REQUEST_COST = 8192  # bytes in memory of a request besides its head, until the response
HEADER_COST = 512  # bytes in memory of each line of a head besides its text
UNREAD = 65_536  # bytes of responses that a client has not read yet, before another request
KEEP_ALIVE = 5.0  # seconds between a response and the next request
LINGER = 1.0  # seconds for a refused client to read the response


class HttpListener(WebSocketListener, typing.Protocol):
    """The part of :class:`~wsserver.sockets.listener.Listener` that an exchange uses."""

    answer: Callable[[Request, Visitor | None], Awaitable[Answer]]
    on_denied: Callable[[Denied, str, Mapping[str, str]], None] | None
    tls: ssl.SSLContext | None
    lingering: dict["Exchange", None]
    spare: dict["Exchange", None]
    answering: set[asyncio.Task[None]]
    closing: bool

    def linger(self, exchange: "Exchange") -> None:
        """Keep a connection that counts for no limit; abort the oldest of too many."""

    def take_spare(self, exchange: "Exchange") -> None:
        """Keep a connection in a place for probes; abort the oldest of too many."""


class Exchange(TcpConnection):
    """One request and its response.

    Args:
        listener: owner of the connection.
        user: user at the other end, where an earlier exchange of the connection found it. The
            owner of a socket does not change.
    """

    _listener: HttpListener

    def __init__(self, listener: HttpListener, user: int | None = None) -> None:
        super().__init__(listener)
        self.visitor = None
        self._user = user
        self._denied: Denied | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parser = RequestParser()
        # A task answers the request, perhaps longer than the connection lasts.
        self._answering = False
        self._dropping = False  # received bytes are dropped
        self._idle = False  # the connection is between two requests
        # While the application reads the body: set when more of the body has come.
        self._more: asyncio.Event | None = None
        self._timeout: asyncio.Timeout | None = None  # cancels the task that answers

    # The connection.

    def arrive(self, transport: asyncio.Transport) -> None:
        """Count the connection, one with TLS before its handshake."""
        listener = self._listener
        self.transport = transport
        listener.connections.add(self)
        name = transport.get_extra_info("peername")
        here = transport.get_extra_info("sockname")
        # The client of a unix socket may have a name. A disconnected client has no address.
        peer = name[0] if isinstance(name, tuple) else "gone" if isinstance(here, tuple) else "unix"
        try:
            if listener.admission is not None:
                user = self._user
                matters = listener.admission.users is not None and isinstance(name, tuple)
                if matters and user is None:
                    user = user_at(name, here)
                # Checked after the user: a client that has just closed is not elsewhere.
                if user == ELSEWHERE and not established(transport.get_extra_info("socket")):
                    user = NOBODY
                self.visitor = listener.admission.arrive(peer, user)
                if self.visitor.spare:
                    listener.take_spare(self)
        except Denied as denied:
            self._denied = denied
            self._abort_after(LINGER)
            if listener.on_denied is not None:
                listener.on_denied(denied, peer, {})
            listener.linger(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request, or refuse the connection at once."""
        transport = typing.cast("asyncio.Transport", transport)  # uvloop's are no subclass
        if self._listener.tls is None:
            self.arrive(transport)
        else:
            self.below, self.transport = self.transport, transport
            transport.set_read_buffer_limits(READ_SIZE)  # type: ignore[attr-defined]
        self.begin()

    def begin(self) -> None:
        """Wait for a request, or refuse a connection that has been denied."""
        if self._denied is None:
            self._abort_after(self._listener.settings.open_timeout)
        else:
            self._write_and_drop(_refusal(self._denied))

    def begin_idle(self) -> None:
        """Wait for the first byte of another request."""
        self._idle = True
        self._abort_after(KEEP_ALIVE)
        self._listener.linger(self)

    def tls_ready(self, tls: "asyncio.Future[None]") -> None:
        """The TLS handshake finished or failed. No other callback reports a failure."""
        if tls.cancelled() or tls.exception() is not None or self.below is None:
            self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. A task that answers its request goes on."""
        super().connection_lost(exc)
        self._leave()
        if self._more is not None:
            self._more.set()
        if not self._answering:
            self._hold(0)

    def hand_over(self, successor: TcpConnection) -> None:
        """Let another protocol serve the connection from now on."""
        super().hand_over(successor)
        self._leave()

    def _leave(self) -> None:
        self._listener.lingering.pop(self, None)
        self._listener.spare.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        self._parser.close()

    def _abort_after(self, seconds: float) -> None:
        """Abort the connection when this phase has lasted so long."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.transport.is_closing():  # else the timer would keep the request
            self._timer = self._listener.loop.call_later(seconds, self.abort)

    # The request.

    def buffer_updated(self, size: int) -> None:
        """Parse more of the request. A task answers the request once its head is complete."""
        if self._idle:
            self._idle = False
            self._listener.lingering.pop(self, None)
            self.arrive(self.transport)
            self.begin()
        if self._dropping:
            return
        parser = self._parser
        waiting = parser.head is None
        try:
            parser.feed(bytes(self._listener.buffer[:size]))
        except BadRequest as bad:
            self._write_and_drop(bad.response.encode())
            return
        kept = len(parser.early) + len(parser.body)
        if not self._hold(REQUEST_COST + HEADER_COST * parser.lines + parser.size + kept):
            self._deny(no_memory())
            return
        if self._more is not None:
            self._more.set()
        elif kept >= READ_SIZE or parser.more:
            self.transport.pause_reading()
        if waiting and parser.head is not None:
            self._answering = True
            request = replace(parser.head, read_body=self._read_body, extend=self._extend)
            task = self._listener.loop.create_task(self._answer(request))
            self._listener.answering.add(task)
            task.add_done_callback(self._listener.answering.discard)

    async def _read_body(self, limit: int) -> bytes:
        """Read the body of the request; see :attr:`Request.read_body`.

        The body has the `open_timeout`, and a second more for each :data:`BODY_RATE` bytes of it.
        """
        parser, loop = self._parser, self._listener.loop
        assert parser.head is not None
        headers = parser.head.headers
        if parser.length is None and "transfer-encoding" not in headers:
            message = "Send the Content-Length of the body."
            raise BadRequest(HTTPStatus.LENGTH_REQUIRED, message)
        if (parser.length or 0) > limit:
            raise too_large(limit)
        waits = "expect" in headers and parser.head.version != "1.0"  # RFC 9110 section 10.1.1
        self._check_open()
        if waits and not (parser.ended or parser.body):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._more = asyncio.Event()
        began, timeout = loop.time(), self._listener.settings.open_timeout
        self._suspend_timeouts()
        try:
            while not parser.ended and len(parser.body) <= limit:
                self._more.clear()
                async with asyncio.timeout_at(began + timeout + len(parser.body) / BODY_RATE):
                    await self._more.wait()
                self._check_open()
        except TimeoutError:
            raise too_slow() from None
        finally:
            self._more = None
            self._extend(0)
        if len(parser.body) > limit:
            raise too_large(limit)
        return bytes(parser.body)

    def _suspend_timeouts(self) -> None:
        """Read the body without the timeouts of the answer: the body has its own."""
        assert self._timeout is not None
        assert self._timer is not None
        self._timeout.reschedule(None)
        self._timer.cancel()
        self.transport.resume_reading()

    def _extend(self, seconds: float) -> None:
        """Give the application the `open_timeout` and so many seconds for its answer, from now."""
        assert self._timeout is not None
        timeout = self._listener.settings.open_timeout + seconds
        self._timeout.reschedule(self._listener.loop.time() + timeout)
        self._abort_after(timeout)

    def _check_open(self) -> None:
        if self._dropping or self.transport.is_closing():
            raise BadRequest(HTTPStatus.BAD_REQUEST, "The request has no end.")

    # The response.

    async def _answer(self, request: Request) -> None:
        try:
            async with asyncio.timeout(self._listener.settings.open_timeout) as self._timeout:
                answer = await self._listener.answer(request, self.visitor)
        except TimeoutError:
            return  # the timer aborts the connection at the same time
        finally:
            self._answering = False
            if self not in self._listener.connections:
                self._hold(0)
        # The client has disconnected, or the request was refused.
        if self.transport.is_closing() or self._dropping:
            if isinstance(answer, Stream):
                answer.producer.closed()
            return
        keep = self._may_keep(request)
        if isinstance(answer, Response):
            self._respond(answer, keep=keep)
        elif isinstance(answer, Stream):
            self._stream(answer, request, keep=keep)
        elif self._listener.closing:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            self._write_and_drop(respond(status, "The server is shutting down.").encode())
        else:
            self._upgrade(request, answer)

    def _may_keep(self, request: Request) -> bool:
        """Whether the connection may serve another request.

        The client asks for it. One that sends requests before the response is not served so: its
        next request may have come in part.
        """
        parser = self._parser
        tokens = {
            token.strip() for token in request.headers.get("connection", "").lower().split(",")
        }
        asked = "keep-alive" in tokens and "close" not in tokens
        served = self.visitor is not None and not self.visitor.spare
        alone = parser.ended and not (parser.more or parser.early)
        return asked and served and alone and not self._listener.closing

    def _respond(self, response: Response, *, keep: bool) -> None:
        if not keep or response.status >= HTTPStatus.BAD_REQUEST:
            self._write_and_drop(response.encode())
            return
        self.transport.write(response.encode(keep=True))
        if self.waiting > UNREAD:
            self._write_and_drop(b"")
        else:
            self.serve_next(self)

    def serve_next(self, before: TcpConnection) -> None:
        """Wait for the next request of a connection. The connection counts for no limit."""
        user = None if before.visitor is None else before.visitor.user
        following = Exchange(self._listener, user)
        following.transport, following.below = before.transport, before.below
        before.hand_over(following)
        if not following.transport.is_closing():
            following.transport.resume_reading()  # a body that nobody read has paused it
        if self._listener.admission is not None and before.visitor is not None:
            self._listener.admission.depart(before.visitor)
        following.begin_idle()

    def _stream(self, stream: Stream, request: Request, *, keep: bool) -> None:
        chunked = request.version != "1.0"
        keep = keep and chunked
        following = self.serve_next if keep else None
        body = StreamedResponse(
            self._listener, self, stream.producer, chunked=chunked, following=following
        )
        self.hand_over(body)
        body.begin(stream.encode(chunked=chunked, keep=keep))

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
        early = self._parser.early
        opened = Socket(self._listener, self, library.subprotocol)
        self.hand_over(opened)
        opened.begin(early)

    def _deny(self, denied: Denied) -> None:
        """Refuse the connection after its head has come."""
        if self._listener.on_denied is not None and self.visitor is not None:
            self._listener.on_denied(denied, self.visitor.address, {})
        self._write_and_drop(_refusal(denied))

    def _write_and_drop(self, response: bytes) -> None:
        """Write the last response of the connection, and read no more requests.

        Later bytes are read and dropped until the client closes or the time for a request is over.
        To close a connection with unread bytes would reset it, and the client would lose the
        response.
        """
        self._dropping = True
        self._parser.close()
        self.transport.write(response)
        if self.transport.can_write_eof():
            half_close(self.transport)
        if self._more is not None:
            self._more.set()
        self._hold(0)
        if not self.transport.is_closing():
            self.transport.resume_reading()


def _choose(spoken: Sequence[str], offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Return the first spoken subprotocol that the client offers, if it offers one."""
    return next((Subprotocol(own) for own in spoken if own in offered), None)


def _refusal(denied: Denied) -> bytes:
    return respond(denied.status, denied.message, headers=denied.headers).encode()
