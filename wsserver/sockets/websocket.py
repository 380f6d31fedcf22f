"""A WebSocket over the sans-I/O protocol of the websockets library.

A socket has no task. It writes without waiting, and delivers a message in the call that reads the
message. The bytes that a socket has in memory count for its client.
"""

import asyncio
import logging
import secrets
import typing
from collections.abc import Callable

from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from wsserver.admission import Visitor
from wsserver.limits import Bucket, memory_size
from wsserver.logs import log
from wsserver.protocol import Close
from wsserver.sockets.tcp import READ_SIZE, TcpConnection, TcpListener, Writer, half_close

# The library logs a failed handshake as an error, and any client can make handshakes fail.
SILENT = logging.getLogger("wsserver.websockets")
SILENT.setLevel(logging.CRITICAL)

BITE = 512  # bytes parsed at once
FRAMES_PER_TURN = 16  # frames of one socket in one turn of the event loop
FRAGMENTS = 256  # of one message, as even an empty fragment takes time; besides,
FRAGMENT_SIZE = 64  # bytes of the message allow one fragment more


class Receiver(typing.Protocol):
    """Serves one WebSocket."""

    def receive(self, message: str | bytes) -> None:
        """Receive a message."""

    def wake(self) -> None:
        """Write on: the client reads again."""


class WebSocketListener(TcpListener, typing.Protocol):
    """The part of :class:`~wsserver.sockets.listener.Listener` that a WebSocket uses."""

    on_open: "Callable[[Socket, Visitor], Receiver] | None"
    on_close: "Callable[[Socket, Visitor], None] | None"


class Socket(Writer):
    """A WebSocket with synchronous writes, and a deadline for a client that does not read.

    Keep-alive pings cannot detect a client that stopped reading: a ping waits behind the bytes that
    the client does not read.

    Args:
        listener: owner of the connection.
        before: the connection before it opened.
        subprotocol: the subprotocol of the handshake; None where the client offered none.
    """

    __slots__ = (
        "_connection",
        "_control",
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
        "subprotocol",
    )

    _listener: WebSocketListener

    def __init__(
        self, listener: WebSocketListener, before: TcpConnection, subprotocol: str | None = None
    ) -> None:
        super().__init__(listener, before)
        self.subprotocol = subprotocol
        settings = listener.settings
        # The protocol of the handshake would keep the request.
        self._protocol = Protocol(Side.SERVER, max_size=settings.message_size, logger=SILENT)
        self.id = self._protocol.id
        self._unread = b""  # received bytes that a later turn parses
        # Of a message in fragments: its bytes, the number of fragments, and whether it is text.
        self._message: bytearray | None = None
        self._parts = 0
        self._text = False
        self._control: Bucket | None = None  # limits unsolicited pings and pongs
        self._ping: bytes | None = None  # data of the ping that waits for its pong
        self._pinged = self.began
        self._leaving = False  # the closing handshake has begun
        self._failed = False  # received frames are ignored
        # Sends the next ping; aborts the socket during its closing handshake.
        self._timer = listener.loop.call_later(settings.ping_interval, self._keep_alive)
        assert listener.on_open is not None
        self._connection = listener.on_open(self, self.visitor)

    @property
    def open(self) -> bool:
        """Whether neither side has begun the closing handshake."""
        return not (self._leaving or self.transport.is_closing())

    @property
    def closed_by_client(self) -> bool:
        """Whether the client has sent a close frame, and so knows that the connection has ended.

        Without a close frame, a proxy or the network may have ended the TCP connection.
        """
        return self._protocol.close_rcvd is not None

    @property
    def ended_with(self) -> int:
        """The close code of the side that closed first; 1006 if neither side sent a close frame.

        The code of the library is also 1006 if the client did not answer the server's close frame.
        """
        protocol = self._protocol
        first = protocol.close_rcvd if protocol.close_rcvd_then_sent else protocol.close_sent
        return 1006 if first is None else first.code

    # Writing.

    def write(self, text: bytes) -> None:
        """Send a text message in UTF-8 without waiting, at once or from a buffer."""
        if self._leaving or self.transport.is_closing():
            return
        self._write(frame(text))

    def end(self, code: int, reason: str = "") -> None:
        """Begin the closing handshake after all earlier writes."""
        if self.open:
            self._protocol.send_close(code, reason)
            self._send()

    def _fail(self, code: int, reason: str) -> None:
        """Begin the closing handshake, and ignore all later frames of the client."""
        self._failed = True
        self._protocol.fail(code, reason)
        self._send()

    def _send(self) -> None:
        """Write what the library has to send; abort a closing socket after the `send_timeout`."""
        _flush(self._protocol, self.transport)
        if self._protocol.state is not State.OPEN and not self._leaving:
            self._leaving = True
            self._timer.cancel()
            timeout = self._listener.settings.send_timeout
            self._timer = self._listener.loop.call_later(timeout, self.abort)

    def _wake(self) -> None:
        if self.open:
            self._connection.wake()

    # Reading.

    def buffer_updated(self, size: int) -> None:
        """Parse some of the received frames, and the others in later turns of the event loop."""
        self._unread += self._listener.buffer[:size]
        self._read(FRAMES_PER_TURN)
        self._count()
        if self._unread or size == READ_SIZE:  # uvloop would read on in the same turn
            self.transport.pause_reading()
            self._listener.loop.call_soon(self._read_on)

    def begin(self, early: bytes) -> None:
        """Parse the bytes that came before the handshake response, and read on."""
        if early:
            self._unread = early
            self.transport.pause_reading()
            self._listener.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._read(FRAMES_PER_TURN)
        self._count()
        if self._unread:
            self._listener.loop.call_soon(self._read_on)
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def _read(self, most: int) -> None:
        """Parse at most ``most`` frames of the unread bytes."""
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
                    self._handle_frame(event)
                frames += 1
        if self.transport.is_closing():
            self._unread = b""  # the connection has ended

    def _count(self) -> None:
        """Count the received bytes in memory and the bytes that the client does not read.

        Without memory for these bytes the connection is closed: none of them can be dropped.
        """
        unsent, unparsed = self.waiting, self._protocol.reader.buffer
        size = unsent
        for kept in (self._unread, unparsed, self._message):
            if kept:
                size += memory_size(kept)
        if self._hold(size) or self.transport.is_closing():
            return
        self._unread, self._message = b"", None
        if unsent > self._listener.settings.write_buffer:
            self._abort_reader("too much unsent")
        elif not self._failed:
            self._fail(Close.TRY_AGAIN_LATER, "too little memory")

    def eof_received(self) -> None:
        """Close the connection after all earlier reads and writes."""
        self._read(len(self._unread))  # with TLS, data and its end can come in one turn
        self._protocol.receive_eof()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._timer.cancel()
        super().connection_lost(exc)
        assert self._listener.on_close is not None
        self._listener.on_close(self, self.visitor)

    def _handle_frame(self, part: Frame) -> None:
        """Handle a frame, and deliver the message that it ends."""
        if part.opcode in {Opcode.PING, Opcode.PONG}:
            self._handle_control(part)
        elif part.opcode is Opcode.CLOSE:
            pass  # the library has answered it
        elif part.fin and self._message is None:
            self._deliver(part.data, text=part.opcode is Opcode.TEXT)
        else:
            self._add_fragment(part)

    def _add_fragment(self, part: Frame) -> None:
        """Add a fragment to its message, and deliver the message that it ends."""
        if self._message is None:
            self._message, self._parts, self._text = bytearray(), 0, part.opcode is Opcode.TEXT
        self._message += part.data
        self._parts += 1
        if part.fin:
            message, self._message = bytes(self._message), None
            self._deliver(message, text=self._text)
        elif self._parts >= FRAGMENTS + len(self._message) // FRAGMENT_SIZE:
            self._message = None
            self._fail(Close.MESSAGE_TOO_BIG, "too many fragments")

    def _deliver(self, data: bytes | bytearray | memoryview, *, text: bool) -> None:
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

    def _handle_control(self, part: Frame) -> None:
        """Handle a ping or pong, and close the connection of a client that sends too many.

        Each ping costs an answer. The limit of messages does not count control frames.
        """
        if part.opcode is Opcode.PONG and part.data == self._ping:
            self._ping = None
            return
        settings, now = self._listener.settings, self._listener.loop.time()
        if self._control is None:
            self._control = Bucket(settings.frame_rate, settings.frame_burst, now)
        if self._control.consume(now) and not self._leaving:
            # A closing handshake would still answer pings.
            self._fail(Close.POLICY_VIOLATION, "too many pings")

    # Keep-alive.

    def _keep_alive(self) -> None:
        """Send a ping in each interval; close the connection if no pong comes in time."""
        interval = self._listener.settings.ping_interval
        timeout = self._listener.settings.ping_timeout
        now = self._listener.loop.time()
        quiet = now - self._pinged
        if not self.writable:  # a ping would wait; the send deadline applies
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
        self._timer = self._listener.loop.call_later(wait, self._keep_alive)


def frame(text: bytes) -> bytes:
    """Return a text message as a server sends it: one frame, not masked (RFC 6455 section 5.2)."""
    size = len(text)
    if size < 126:  # noqa: PLR2004
        return b"\x81" + size.to_bytes() + text
    if size < 65536:  # noqa: PLR2004
        return b"\x81\x7e" + size.to_bytes(2) + text
    return b"\x81\x7f" + size.to_bytes(8) + text


def _flush(protocol: Protocol, transport: asyncio.Transport) -> None:
    """Write what the library has to send, unless the connection is closing."""
    for data in protocol.data_to_send():
        if transport.is_closing():
            return
        if data:
            transport.write(data)
        else:
            half_close(transport)
