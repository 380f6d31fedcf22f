"""Listening sockets, and the connections that they accept."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping

from wsserver.admission import Admission, Visitor
from wsserver.denials import Denied
from wsserver.descriptors import AT_ONCE, OPERATORS, SPARE, lingering
from wsserver.limits import Memory
from wsserver.responses import Answer, Request
from wsserver.settings import Settings
from wsserver.sockets.exchange import Exchange
from wsserver.sockets.listening import Acceptor, bound
from wsserver.sockets.tcp import READ_SIZE, TcpConnection
from wsserver.sockets.tls import Tls
from wsserver.sockets.websocket import Receiver, Socket
from wsserver.telemetry import Metrics


class Listener:
    """Listening sockets, and what all connections that they accept have in common.

    Args:
        settings: the times and limits.
        answer: answers a request, or allows it to open a WebSocket.
        memory: counts the bytes that clients sent or do not read.
        metrics: counts aborted readers.
        admission: the rules for connections; None accepts all.
        on_denied: called with each refusal of a connection.
        on_open: called with each WebSocket that opens; returns what serves it.
        on_close: called with each WebSocket that has closed.
        tls: the TLS context; None for plain TCP.
    """

    def __init__(
        self,
        settings: Settings,
        answer: Callable[[Request, Visitor | None], Awaitable[Answer]],
        memory: Memory,
        metrics: Metrics,
        *,
        admission: Admission | None = None,
        on_denied: Callable[[Denied, str, Mapping[str, str]], None] | None = None,
        on_open: Callable[["Socket", Visitor], "Receiver"] | None = None,
        on_close: Callable[["Socket", Visitor], None] | None = None,
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
        # All connections, from accept to close.
        self.connections: set[TcpConnection] = set()
        # The connections that count for no limit, the oldest first: refused ones, and those between
        # two requests.
        self.lingering: dict[Exchange, None] = {}
        # The connections in places for probes, the oldest first.
        self.spare: dict[Exchange, None] = {}
        # The tasks that answer requests, also of disconnected clients.
        self.answering: set[asyncio.Task[None]] = set()
        self.closing = False  # whether new WebSockets are refused
        # All connections read into this buffer. Event loops call `buffer_updated` right after a
        # read, so a connection takes its data before another connection reads. It is a memoryview
        # because asyncio's TLS fills slices of it.
        self.buffer = memoryview(bytearray(READ_SIZE))
        self._acceptors: list[Acceptor] = []
        self._most_lingering = lingering(settings)

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

    def linger(self, exchange: "Exchange") -> None:
        """Keep a connection that counts for no limit; abort the oldest of too many."""
        _keep(self.lingering, exchange, self._most_lingering)

    def take_spare(self, exchange: "Exchange") -> None:
        """Keep a connection in a place for probes; abort the oldest of too many."""
        _keep(self.spare, exchange, SPARE)

    def _full(self) -> bool:
        """Whether one more connection would take a descriptor that other parts need."""
        if self.admission is None:
            return len(self.connections) >= OPERATORS
        beside = SPARE + self._most_lingering + AT_ONCE
        return len(self.connections) >= self.settings.connections + beside

    def _protocol(self) -> asyncio.BaseProtocol:
        exchange = Exchange(self)
        return exchange if self.tls is None else Tls(self, exchange, self.tls)


def _keep(few: dict[Exchange, None], exchange: Exchange, most: int) -> None:
    """Add a connection; abort the oldest of more than ``most``."""
    few[exchange] = None
    if len(few) > most:
        first = next(iter(few))
        del few[first]
        first.abort()
