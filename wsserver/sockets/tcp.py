"""The connection of a client: what WebSockets and HTTP responses have in common.

The bytes that a connection holds count for its client. A client that does not read is aborted.
"""

import asyncio
import contextlib
import socket
import typing
from uuid import UUID

from wsserver.admission import Admission, Visitor
from wsserver.limits import Account, Memory
from wsserver.logs import log
from wsserver.settings import Settings
from wsserver.telemetry import Aborted, Metrics

# Bytes that the kernel takes before it sends them (TCP_NOTSENT_LOWAT). Few, so that the text for a
# slow reader waits here, where pieces are merged, and a stop does not wait behind stale text.
UNSENT_IN_KERNEL = 16384
READ_SIZE = 8192  # bytes read from one connection before other connections

_OPERATORS: Account = ("operators",)  # the account of connections without admission


class TcpListener(typing.Protocol):
    """The part of :class:`~wsserver.sockets.listener.Listener` that a connection uses."""

    settings: Settings
    memory: Memory
    admission: Admission | None
    metrics: Metrics
    loop: asyncio.AbstractEventLoop
    connections: set[typing.Any]
    buffer: memoryview


class TcpConnection(asyncio.BufferedProtocol):
    """A connection over TCP or a unix socket, with or without TLS."""

    __slots__ = (
        "_account",
        "_closed",
        "_held",
        "_listener",
        "_paused",
        "below",
        "transport",
        "visitor",
    )

    transport: asyncio.Transport  # writes to the client
    visitor: Visitor | None  # the client as admission knows it; None on the operators' port

    def __init__(self, listener: TcpListener) -> None:
        self._listener = listener
        # The transport that TLS writes to; None without TLS.
        self.below: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] | None = None
        self._held = 0  # bytes that are counted for the connection
        self._account = _OPERATORS  # the account of these bytes
        self._paused = False  # the write buffer is full; the transport tells so once

    def get_buffer(self, _: int) -> memoryview:
        """Return the buffer of all connections; see :attr:`Listener.buffer`."""
        return self._listener.buffer

    def _hold(self, size: int) -> bool:
        """Count the bytes that the connection holds now.

        Returns:
            False where the account has no memory left. The count is then as before.
        """
        memory, more = self._listener.memory, size - self._held
        if not self._held and self.visitor is not None:
            self._account = self.visitor.account
        if more > 0 and not memory.acquire(self._account, more):
            return False
        memory.release(self._account, -more)
        self._held = size
        return True

    @property
    def waiting(self) -> int:
        """Bytes that the kernel has not taken yet."""
        below = 0 if self.below is None else self.below.get_write_buffer_size()
        return self.transport.get_write_buffer_size() + below

    def pause_writing(self) -> None:
        """The client has fallen behind."""
        self._paused = True

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._paused = False

    def hand_over(self, successor: "TcpConnection") -> None:
        """Let another protocol serve the connection from now on."""
        self._hold(0)
        self._listener.connections.discard(self)
        self._listener.connections.add(successor)
        self.transport.set_protocol(successor)
        if self._paused:
            successor.pause_writing()

    def abort(self) -> None:
        """Abort the connection. Unsent bytes are lost."""
        self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        """Forget the connection."""
        self._listener.connections.discard(self)
        if self.visitor is not None and self._listener.admission is not None:
            self._listener.admission.depart(self.visitor)
        if self._closed is not None:
            self._closed.set_result(None)

    async def wait_closed(self) -> None:
        """Wait until the connection is closed."""
        if self in self._listener.connections:
            self._closed = self._closed or self._listener.loop.create_future()
            await asyncio.shield(self._closed)


class Writer(TcpConnection):
    """A connection that writes without waiting, with a deadline for a client that does not read.

    Args:
        listener: owner of the connection.
        before: the connection in its phase before.
    """

    __slots__ = ("_deadline", "_unsent", "began", "id")

    id: UUID  # name of the connection in the log
    visitor: Visitor

    def __init__(self, listener: TcpListener, before: TcpConnection) -> None:
        super().__init__(listener)
        assert before.visitor is not None
        self.began = listener.loop.time()  # time of the event loop when this phase began
        self.transport = before.transport
        self.below = before.below
        self.visitor = before.visitor
        self._deadline: asyncio.TimerHandle | None = None  # for the client to read something
        self._unsent = 0  # bytes that waited when the deadline was set, and bytes written since
        self.transport.set_write_buffer_limits(listener.settings.write_buffer)
        if self.below is not None:
            self.below.set_write_buffer_limits(UNSENT_IN_KERNEL)
        self._set_option("TCP_NOTSENT_LOWAT", UNSENT_IN_KERNEL)
        # asyncio sets it only for sockets that were made with the protocol's number.
        self._set_option("TCP_NODELAY", 1)

    def _set_option(self, name: str, value: int) -> None:
        """Set an option of TCP, where the system has it."""
        option, sock = getattr(socket, name, None), self.transport.get_extra_info("socket")
        if option is not None and sock.family != getattr(socket, "AF_UNIX", None):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._deadline is None and not self.transport.is_closing()

    def _write(self, data: bytes) -> None:
        """Write at once or from a buffer, and abort a client that has too much unread."""
        if self._deadline is not None:
            self._unsent += len(data)
        self.transport.write(data)
        if self._deadline is not None:
            self._check_unsent()
            self._count()

    def pause_writing(self) -> None:
        """The client has fallen behind: the client has to read something within the deadline."""
        super().pause_writing()
        self._set_deadline()
        self._count()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._count()
        self._wake()

    def _wake(self) -> None:
        """Tell the writer of the content that the client has caught up."""
        raise NotImplementedError

    def _count(self) -> None:
        """Count the bytes of the connection; end the connection where no memory is left."""
        raise NotImplementedError

    def _set_deadline(self) -> None:
        self._unsent = self.waiting
        timeout = self._listener.settings.send_timeout
        self._deadline = self._listener.loop.call_later(timeout, self._check_progress)

    def _check_progress(self) -> None:
        if self.waiting < self._unsent:
            self._set_deadline()  # the client is slow, but reads
        else:
            self._abort_reader("does not read")

    def _check_unsent(self) -> None:
        if self.waiting > self._listener.settings.max_unsent and not self.transport.is_closing():
            self._abort_reader("too much unsent")

    def _abort_reader(self, why: Aborted) -> None:
        log.info("reader aborted", socket=self.id, reason=why)
        self._listener.metrics.reader_aborted(why)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)
        self._hold(0)


def half_close(transport: asyncio.Transport) -> None:
    """Close the writing side; the whole connection with TLS, which has no half-close."""
    # The client has gone. TLS raises also if what it reads before the close ends the connection.
    with contextlib.suppress(OSError, RuntimeError):
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()
