"""One HTTP/1.1 connection to a model's API. It carries one request at a time (RFC 9112).

`httptools` parses the responses. The call that reads bytes of a body from the socket passes them to
the reader, without a coroutine in between: a token costs one callback.
"""

import asyncio
import math
import re
import select
from typing import Protocol, cast

import httptools

from wsserver.models.response import (
    Accept,
    ClosedEarly,
    HttpError,
    MalformedResponse,
    NoResponse,
    Response,
)

MAX_HEAD = 65_536  # bytes of a response's status line and headers, interim responses included
WRITE_SIZE = 65_536  # bytes of a request's body that are written at once
DRAIN_TIME = 1.0  # seconds for the rest of a released body; then the connection is closed
DRAIN_SIZE = 65_536  # bytes of the rest of a released body; then the connection is closed
KEEP_ALIVE_MARGIN = 1.0  # seconds: an idle connection is closed so long before the server does

_TIMEOUT = re.compile(rb"\btimeout=(\d{1,9})\b", re.IGNORECASE)
_OK = 200
_BODILESS = (204, 304)


class Owner(Protocol):
    """The pool that a connection belongs to."""

    def on_free(self, connection: "Connection") -> None:
        """Keep a connection that can carry another request."""

    def on_lost(self, connection: "Connection") -> None:
        """Remove a closed connection."""


class Connection(asyncio.Protocol):
    """The protocol of one connection."""

    def __init__(self, owner: Owner) -> None:
        # Seconds for which the connection may be idle, if the server's `Keep-Alive` says so.
        self.keep_alive = math.inf
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None  # the response to the request under way
        self._headers: list[tuple[bytes, bytes]] = []  # of a head that is not complete
        self._body: list[bytes] = []  # parts of the body in the bytes that are being parsed
        self._head_size = 0  # bytes of the heads of the response so far
        self._ended = False  # the bytes that are being parsed have the end of the response
        self._interim = False  # an interim response (1xx) is being parsed
        self._until_close = False  # the end of the connection is the end of the body
        self._reusable = True  # another request can be sent after this one
        self._closing = False  # the connection is closed, or is being closed
        self._paused = False  # the write buffer is full
        self._writable: asyncio.Future[None] | None = None  # done when the buffer has room again
        # Aborts the connection if the rest of a released body lasts too long; None otherwise.
        self._drain_timer: asyncio.TimerHandle | None = None
        self._drained = 0  # bytes of the rest of a released body
        self._lost: asyncio.Future[None] | None = None  # done when the connection is closed

    # Requests.

    @property
    def usable(self) -> bool:
        """Whether a request can be sent: the connection is open, and nothing has arrived on it.

        If an idle connection is readable, the server has closed it or has sent bytes without a
        request. The event loop may not have read them yet.
        """
        if self._closing or self._transport is None or self._transport.is_closing():
            return False
        readable = select.poll()
        readable.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not readable.poll(0)

    async def send(self, head: bytes, body: bytes, accept: Accept | None = None) -> Response:
        """Send a request, and return its response as soon as the response begins.

        Args:
            head: request line and headers, including the empty line.
            body: the body. Its size is the `Content-Length` of the head.
            accept: decides about the response's body; see :data:`wsserver.models.response.Accept`.

        Raises:
            NoResponse: the connection ended before the response began.
            MalformedResponse: the response is malformed.
        """
        if self._closing:
            raise NoResponse("the server closed the connection before the request was sent")
        assert self._transport is not None
        assert self._response is None
        self._head_size = 0
        self._interim = self._ended = self._until_close = False
        response = self._response = Response(self, accept)
        try:
            if len(body) <= WRITE_SIZE:
                self._transport.write(head + body)
            else:
                self._transport.write(head)
                await self._upload(body, response)
            await response.head
        except BaseException:
            response.drop_failure()
            await self.close_for(response)
            raise
        return response

    async def _upload(self, body: bytes, response: Response) -> None:
        """Write a large body as fast as the server reads it."""
        assert self._transport is not None
        view = memoryview(body)
        for start in range(0, len(view), WRITE_SIZE):
            if self._paused and not response.head.done():
                self._writable = asyncio.get_running_loop().create_future()
                await asyncio.wait(
                    {self._writable, response.head}, return_when=asyncio.FIRST_COMPLETED
                )
            if response.head.done():  # the server answered early, for example with 413
                self._reusable = False
                return
            self._transport.write(view[start : start + WRITE_SIZE])

    def drain(self, response: Response) -> None:
        """Discard the rest of a body. Close the connection if the rest is long."""
        if response is self._response and self._drain_timer is None:
            self._drain_timer = asyncio.get_running_loop().call_later(DRAIN_TIME, self.abort)
            self.resume_reading()

    async def close_for(self, response: Response) -> None:
        """Close the connection, if it still carries this exchange."""
        if response is self._response and self._drain_timer is None:
            self.abort()
            await self.wait_closed()

    def abort(self) -> None:
        """Close the connection at once, without the closing handshake of TLS."""
        self._closing = True
        self._response = None
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until a connection that was aborted has closed."""
        if self._transport is not None:
            if self._lost is None:
                self._lost = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._lost)

    def pause_reading(self) -> None:
        """Stop reading until :meth:`resume_reading`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Continue reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # For the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the transport."""
        self._transport = cast("asyncio.Transport", transport)
        if self._closing:
            self._transport.abort()

    def pause_writing(self) -> None:
        """Pause an upload: the write buffer is full."""
        self._paused = True

    def resume_writing(self) -> None:
        """Continue an upload."""
        self._paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange: only a body that lasts until the connection closes ends well."""
        self._closing = True
        response, self._response = self._response, None
        self._cancel_drain()
        if response is not None:
            if not response.head.done():
                response.fail(NoResponse("the connection ended before the response began"))
            elif self._until_close and exc is None:
                response.finish()
            else:
                response.fail(ClosedEarly("the connection ended before the body did"))
        self._transport = None
        if self._lost is not None:
            self._lost.set_result(None)
        self._owner.on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, and pass the part of the body in them to the response."""
        response = self._response
        if response is None:  # no request asked for the bytes
            self.abort()
            return
        failure: Exception | None = None
        begun = response.head.done()
        try:
            if not begun:
                self._head_size += len(data)
            self._parser.feed_data(data)
            if not begun and self._head_size > MAX_HEAD and not response.head.done():
                raise MalformedResponse("the response has too many headers")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, HttpError) as error:
            failure = error
        if self._body:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            if self._drain_timer is None:
                response.receive(body)
            else:
                self._drained += len(body)
        if self._ended:
            self._finish(response, reusable=self._reusable and failure is None)
        elif failure is not None:
            cause = failure.__context__  # an error of a callback below
            response.fail(
                cause if isinstance(cause, HttpError) else MalformedResponse(str(failure))
            )
            self.abort()
        elif self._drained > DRAIN_SIZE:
            self.abort()

    def _finish(self, response: Response, *, reusable: bool) -> None:
        assert self._transport is not None
        if self._response is not response:  # the callback has closed the connection
            return
        self._response = None
        self._cancel_drain()
        response.finish()
        if reusable and not self._transport.get_write_buffer_size():
            self.resume_reading()  # the unread body has perhaps paused it
            self._owner.on_free(self)
        else:
            self.abort()

    def _cancel_drain(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
            self._drained = 0

    # For the parser. Bytes after the end of the response are ignored, and end the connection.

    def on_message_begin(self) -> None:
        """Begin a response."""
        if self._ended:
            self._reusable = False
        else:
            self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header; ignore a trailer."""
        if self._ended or self._response is None or self._response.head.done():  # a trailer
            return
        self._headers.append((name.lower(), value.strip()))

    def on_headers_complete(self) -> None:
        """Begin the body; skip an interim response."""
        response = self._response
        if self._ended or response is None:
            return
        status = self._parser.get_status_code()
        if status < _OK:  # the parser itself refuses 101, which has no end
            self._interim = True
            return
        if sum(len(name) + len(value) + 4 for name, value in self._headers) > MAX_HEAD:
            raise MalformedResponse("the response has too many headers")
        codings = [value for name, value in self._headers if name == b"transfer-encoding"]
        if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
            raise MalformedResponse("the response has an unknown transfer coding")
        self._reusable = self._reusable and self._parser.should_keep_alive()
        self._set_keep_alive()
        sized = codings or any(name == b"content-length" for name, _ in self._headers)
        self._until_close = not sized and status not in _BODILESS
        response.begin(status, self._headers)
        self._headers = []

    def _set_keep_alive(self) -> None:
        for name, value in self._headers:
            if name == b"keep-alive" and (found := _TIMEOUT.search(value)) is not None:
                self.keep_alive = max(0.0, int(found[1]) - KEEP_ALIVE_MARGIN)

    def on_body(self, data: bytes) -> None:
        """Store a part of the body until all bytes of the read are parsed."""
        if not self._ended:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """End the response."""
        if self._interim:
            self._interim = False
        else:
            self._ended = True
