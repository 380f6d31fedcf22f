"""TLS for the connections of clients."""

import asyncio
import ssl
import typing
from asyncio.sslproto import SSLProtocol

from wsserver.sockets.exchange import Exchange, HttpListener
from wsserver.sockets.tcp import READ_SIZE


class Tls(SSLProtocol):
    """TLS with a small read buffer. The buffer of asyncio's own class has 256 KiB.

    asyncio reports a connection only after the TLS handshake. This class reports it before: a
    connection counts for the limits during its handshake.
    """

    max_size = READ_SIZE

    def __init__(self, listener: HttpListener, exchange: Exchange, context: ssl.SSLContext) -> None:
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
