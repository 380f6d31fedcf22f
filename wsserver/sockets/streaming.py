"""A response whose body is written while it is made."""

import asyncio
from collections.abc import Callable
from uuid import uuid4

from wsserver.logs import log
from wsserver.responses import Producer
from wsserver.sockets.tcp import READ_SIZE, TcpConnection, TcpListener, Writer, half_close

LAST_CHUNK = b"0\r\n\r\n"
LINGER = 5.0  # seconds for a client to read more or to close the connection, after the body's end


class StreamedResponse(Writer):
    """Writes the body of one response, after its head.

    A client that closes the connection, or only its own side of it, has disconnected: a browser
    aborts a request in this way. A client that has vanished answers nothing: the kernel ends the
    connection once it has not acknowledged a written byte for the `ping_timeout`.

    Args:
        listener: owner of the connection.
        before: the connection while its request was answered.
        producer: makes the body.
        chunked: write the body in chunks (RFC 9112 section 7.1).
        following: serves the next request after the end of the body; None to close the connection.
    """

    __slots__ = ("_chunked", "_dropped", "_ended", "_following", "_head", "_linger", "_producer")

    def __init__(
        self,
        listener: TcpListener,
        before: TcpConnection,
        producer: Producer,
        *,
        chunked: bool,
        following: Callable[[TcpConnection], None] | None,
    ) -> None:
        super().__init__(listener, before)
        self.id = uuid4()
        self._head = b""  # what the first write begins with
        self._chunked = chunked
        self._following = following
        self._dropped = 0  # bytes that came after the request
        self._ended = False
        self._linger: asyncio.TimerHandle | None = None
        self._producer: Producer | None = producer
        # Linux applies the option also to a client that does not read, which has `send_timeout`.
        settings = listener.settings
        unanswered = max(settings.ping_timeout, settings.send_timeout)
        self._set_option("TCP_USER_TIMEOUT", int(unanswered * 1000))

    def begin(self, head: bytes) -> None:
        """Write the head, with what the producer begins with.

        Where the producer fails, the client gets no whole response.
        """
        self._head = head
        self.transport.resume_reading()
        assert self._producer is not None
        try:
            self._producer.open(self)
        except Exception as error:  # noqa: BLE001
            log.error("response failed", socket=self.id, failure=error)
            self.abort()
        self._write_head()

    def _write_head(self) -> None:
        """Write the head, unless it is written."""
        head, self._head = self._head, b""
        if head and not self.transport.is_closing():
            self._write(head)

    def write(self, data: bytes) -> None:
        """Write a part of the body without waiting, at once or from a buffer."""
        if data and not self._ended and not self.transport.is_closing():
            part = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
            if self._head:
                part, self._head = self._head + part, b""
            self._write(part)

    def end(self) -> None:
        """End the body after all earlier writes."""
        if self._ended or self.transport.is_closing():
            return
        self._ended = True
        self._write_head()
        if self._chunked:
            self.transport.write(LAST_CHUNK)
        if self._following is not None and not self._dropped and self.writable:
            self._finish()
            self._following(self)
        else:
            half_close(self.transport)
            self._await_close()

    def _await_close(self) -> None:
        """Abort the connection unless the client reads the rest, or closes it."""
        loop = self._listener.loop
        self._linger = loop.call_later(LINGER, self._check_close, self.waiting)

    def _check_close(self, unsent: int) -> None:
        if self.waiting < unsent:
            self._await_close()  # the client is slow, but reads
        else:
            self.abort()

    def buffer_updated(self, size: int) -> None:
        """Drop bytes after the request; abort a client that sends more than one buffer."""
        self._dropped += size
        if self._dropped > READ_SIZE:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and tell the producer."""
        super().connection_lost(exc)
        if self._linger is not None:
            self._linger.cancel()
        self._finish()

    def _finish(self) -> None:
        self._ended = True
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.closed()

    def _wake(self) -> None:
        if self._producer is not None and not self._ended:
            self._producer.wake()

    def _count(self) -> None:
        if not self._hold(self.waiting) and not self.transport.is_closing():
            self._abort_reader("too much unsent")
