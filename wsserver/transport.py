"""One WebSocket: writing without waiting, and getting rid of those who do not read.

A subclass of the library's connection, as the two things that we need are events of the transport:
that it can be written to again, and that data came in. Keep-alive pings do not notice a peer that
stopped reading, since they wait for their turn behind what that peer does not read.
"""

import asyncio
import contextlib
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Mapping
from typing import Any, cast

from websockets.asyncio.server import Server, ServerConnection, broadcast
from websockets.frames import Frame, Opcode
from websockets.protocol import Event, State
from websockets.server import ServerProtocol

from wsserver.admission import Admission, Denied, Visitor
from wsserver.limits import Bucket
from wsserver.logs import log
from wsserver.protocol import Close
from wsserver.responses import method_not_allowed, respond
from wsserver.settings import Settings
from wsserver.telemetry import Aborted, Metrics

__all__ = ["Socket"]

# Data that the kernel takes before it has sent what it has: little, so that a slow reader is
# noticed here, where its text can be merged, and a stop need not wait behind it.
UNSENT_IN_KERNEL = 16384
READ_SIZE = 8192  # bytes taken from one socket before others get their turn
LINGER = 1.0  # seconds for one who is turned away at the door to read why
LINGERING = 100  # such ones at once, as they take descriptors beyond all limits

_OTHER_METHODS = (b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"OPTIONS ", b"TRACE ", b"CONNECT ")


class Socket(ServerConnection):
    """A connection of the WebSocket library with synchronous writes and a send deadline.

    Args:
        protocol: the library's.
        server: the library's.
        settings: its times and limits for what is sent and read hold here.
        sockets: where it registers for as long as it is connected, handshake included.
        turned_away: where it registers for as long as it is connected, if it may not be.
        admission: who may connect at all.
        on_denied: told why, where one may not.
        metrics: what learns of readers that were aborted.
        tls: what a TLS handshake takes; None where there is to be none.
        options: the library's.

    Attributes:
        visitor: what is known of the client.
    """

    visitor: Visitor

    def __init__(
        self,
        protocol: ServerProtocol,
        server: Server,
        *,
        settings: Settings,
        sockets: set["Socket"],
        turned_away: dict["Socket", None],
        admission: Admission,
        on_denied: Callable[[Denied, str, Mapping[str, str]], None],
        metrics: Metrics,
        tls: ssl.SSLContext | None,
        **options: Any,
    ) -> None:
        super().__init__(protocol, server, **options)
        self.wake: Callable[[], None] = lambda: None
        self._settings = settings
        self._sockets = sockets
        self._turned_away = turned_away
        self._admission = admission
        self._on_denied = on_denied
        self._metrics = metrics
        self._tls = tls
        self._raw: asyncio.Transport | None = None  # what is below TLS, or else the transport
        self._arrived = False
        self._denied: Denied | None = None
        self._set_up = False  # and known to the library
        self._ending: asyncio.Task[None] | None = None
        self._control = Bucket(settings.frame_rate, settings.frame_burst, self.loop.time())
        self._last_moment: asyncio.TimerHandle | None = None  # of one that has been told to go
        self._gone = False
        self._below: asyncio.WriteTransport | None = None  # what TLS writes to, if there is TLS
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent = 0  # when the deadline was set, and what was written since
        self._head = bytearray()  # the end of what came of the request so far
        self._head_ended = False

    @property
    def writable(self) -> bool:
        """Whether the peer keeps up."""
        return self._deadline is None and not self._gone

    @property
    def ended_with(self) -> int:
        """The close code of whoever closed first, once it is closed; 1006 where nobody did.

        The library's is 1006 also for one that was told to go and did so without an answer.
        """
        protocol = self.protocol
        first = protocol.close_rcvd if protocol.close_rcvd_then_sent else protocol.close_sent
        return 1006 if first is None else first.code

    def write(self, frame: bytes) -> None:
        """Send a text frame of UTF-8, at once or from a buffer, without waiting."""
        if not self._gone:
            broadcast((self,), frame, text=True)
            self._unsent += len(frame)
            self._check_unsent()

    def end(self, code: Close, reason: str) -> None:
        """Begin to close, after all that was written before."""
        if self._ending is None:
            self._ending = self.loop.create_task(self.close(code, reason))

    def abort(self) -> None:
        """Cut the connection. What is unsent is lost."""
        self._gone = True
        transport = self.transport if self._set_up else self._raw
        assert transport is not None
        transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, and set it up; where there is TLS, once more after its handshake.

        Left to asyncio, it would be told of only after that: until then nobody would count it.
        """
        transport = cast("asyncio.Transport", transport)  # not all are derived from it
        if self._raw is None:
            self._raw = transport
            self._arrive(transport)
            if self._tls is not None:
                self._shake_hands(transport, self._tls)
                return
        self._begin(transport)

    def _arrive(self, transport: asyncio.Transport) -> None:
        self._sockets.add(self)
        name = transport.get_extra_info("peername")
        peer = name[0] if isinstance(name, tuple) else "unix"  # whose clients may have names
        try:
            self.visitor = self._admission.arrive(peer)
            self._arrived = True
        except Denied as denied:
            self._denied = denied
            self._on_denied(denied, peer, {})
            self._last_moment = self.loop.call_later(LINGER, self.abort)
            self._turned_away[self] = None
            if len(self._turned_away) > LINGERING:
                first = next(iter(self._turned_away))  # who has had most time to read
                del self._turned_away[first]
                first.abort()

    def _shake_hands(self, raw: asyncio.Transport, context: ssl.SSLContext) -> None:
        shaken: asyncio.Future[None] = self.loop.create_future()
        shaken.add_done_callback(self._shaken)
        tls = _Tls(
            self.loop,
            self,
            context,
            shaken,
            server_side=True,
            ssl_handshake_timeout=self._settings.open_timeout,  # type: ignore[arg-type]
        )
        raw.set_protocol(tls)
        tls.connection_made(raw)

    def _shaken(self, shaken: asyncio.Future[None]) -> None:
        failed = shaken.cancelled() or shaken.exception() is not None
        if failed or not self._set_up:
            self._forget()

    def _begin(self, transport: asyncio.Transport) -> None:
        """Have the library take over."""
        super().connection_made(transport)
        self._set_up = True
        if self._denied is not None:
            denied = self._denied
            response = respond(denied.status, denied.message, headers=denied.headers)
            self._answer_and_drop(response.serialize())
            return
        # asyncio's name for it; else one read brings ten thousands of frames, in one turn.
        with contextlib.suppress(AttributeError):  # other event loops have other names, or none
            transport.max_size = READ_SIZE  # type: ignore[attr-defined]
        if self._raw is not None and self._raw is not transport:
            transport.set_read_buffer_limits(READ_SIZE)  # type: ignore[attr-defined]
            self._raw.set_write_buffer_limits(UNSENT_IN_KERNEL)
            self._below = self._raw
        sock = transport.get_extra_info("socket")
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if option is not None and sock.family != getattr(socket, "AF_UNIX", None):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, UNSENT_IN_KERNEL)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        self._gone = True
        self._sockets.discard(self)
        self._turned_away.pop(self, None)
        if self._arrived:
            self._arrived = False
            self._admission.depart(self.visitor)
        for timer in (self._deadline, self._last_moment):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The peer falls behind: from now on it has to read something within the deadline."""
        super().pause_writing()
        self._set_deadline()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        super().resume_writing()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.state is State.OPEN:
            self.wake()

    def data_received(self, data: bytes) -> None:
        """Feed the library, and see what it had to answer."""
        if self.state is State.CONNECTING:
            data = self._request_in(data)
        if data:
            super().data_received(data)
            # Pongs are written whether or not the peer reads them.
            self._check_unsent()
            if self.state is State.CLOSING and self._last_moment is None:
                # The library waits for the peer to go, and that may be for its next ping.
                self._last_moment = self.loop.call_later(self._settings.send_timeout, self.abort)

    def process_event(self, event: Event) -> None:
        """Take a frame, and see that there are not too many of those that are no messages.

        Each costs an answer, and none is seen by whoever counts messages.
        """
        super().process_event(event)
        if (
            isinstance(event, Frame)
            and event.opcode in {Opcode.PING, Opcode.PONG}
            and self.state is State.OPEN
            and self._control.take(self.loop.time())
        ):
            # Not the closing handshake, as that would go on to read and to answer.
            self.protocol.fail(Close.POLICY_VIOLATION, "too many pings")
            self.send_data()

    def send_data(self) -> None:
        """Write what the library has to say, unless nobody is left to hear it."""
        if self._gone or self.transport.is_closing():
            self.protocol.data_to_send()
        else:
            super().send_data()

    def _request_in(self, data: bytes) -> bytes:
        """Return what belongs to the request: no body, nor anything sent before its answer."""
        if self._head_ended:
            return b""
        if not self._head and data.startswith(_OTHER_METHODS):
            # The library hangs up on requests with a body. So this one is answered here.
            self._answer_and_drop(method_not_allowed().serialize())
            return b""
        before = len(self._head)
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end >= 0:
            self._head_ended = True
            data = data[: end + 4 - before]
        del self._head[:-3]
        return data

    def _waiting(self) -> int:
        """Return how many bytes the kernel has not taken yet."""
        below = 0 if self._below is None else self._below.get_write_buffer_size()
        return self.transport.get_write_buffer_size() + below

    def _answer_and_drop(self, response: bytes) -> None:
        """Answer before the library does.

        What follows is read and dropped until the peer has gone or the time for it is up: to close
        on unread data would reset the connection, and take the answer with it.
        """
        self._head_ended = True
        self.transport.write(response)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _check_unsent(self) -> None:
        if self._waiting() > self._settings.max_unsent and not self._gone:
            self._abort_reader("too much unsent")

    def _set_deadline(self) -> None:
        self._unsent = self._waiting()
        self._deadline = self.loop.call_later(self._settings.send_timeout, self._check_progress)

    def _check_progress(self) -> None:
        if self._waiting() < self._unsent:
            self._set_deadline()  # slow, but alive
        else:
            self._abort_reader("does not read")

    def _abort_reader(self, why: Aborted) -> None:
        log.info("reader aborted", socket=self.id, reason=why)
        self._metrics.reader_aborted(why)
        self.abort()


class _Tls(SSLProtocol):
    """TLS that takes little at once, and keeps little: asyncio's takes a quarter of a megabyte."""

    max_size = READ_SIZE
