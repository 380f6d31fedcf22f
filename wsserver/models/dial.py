"""Opens a connection to a server: DNS, TCP, the tunnel of a proxy, TLS."""

import asyncio
import contextlib
import functools
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from aiohappyeyeballs import start_connection

from wsserver.models.h1 import Connection
from wsserver.models.proxy import Proxy
from wsserver.models.response import HttpError

ATTEMPT_DELAY = 0.25  # seconds before the next address is also tried (RFC 8305 section 5)
DNS_TIME = 10.0  # seconds for which the addresses of a name are kept
MAX_TUNNEL_HEAD = 65_536  # bytes of a proxy's answer

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: |\r\n)")

Found = list[tuple[Any, ...]]
"""The result of :func:`socket.getaddrinfo`."""


class CannotConnect(HttpError):
    """No connection could be opened: no address, no answer, or a failure of TLS."""


class ConnectTimeout(CannotConnect):
    """No connection could be opened in time."""


class Untrusted(CannotConnect):
    """The certificate of the server or of the proxy is not trusted."""


class ProxyRefused(CannotConnect):
    """The proxy refused to open a tunnel."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The server that requests go to, and the proxy on the way."""

    scheme: str  # `http` or `https`
    host: str  # name or address, in ASCII
    port: int
    server_name: str  # the name in the TLS handshake, which the certificate must have
    proxy: Proxy | None = None  # the proxy that connections go through


class Resolver:
    """Looks up names in DNS, and caches the addresses for some seconds."""

    def __init__(self) -> None:
        self._lookups: dict[tuple[str, int], asyncio.Task[Found]] = {}

    async def resolve(self, host: str, port: int) -> Found:
        """Return the addresses of a host.

        Raises:
            OSError: the name has no address.
            UnicodeError: the name is malformed.
        """
        if literal := _literal(host, port):
            return literal
        lookup = self._lookups.get((host, port))
        if lookup is None:
            lookup = asyncio.get_running_loop().create_task(_look_up(host, port))
            self._lookups[host, port] = lookup
            lookup.add_done_callback(functools.partial(self._keep, (host, port)))
        await asyncio.wait({lookup})
        return lookup.result()

    async def aclose(self) -> None:
        """Cancel the lookups."""
        lookups = set(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        if lookups:
            await asyncio.wait(lookups)

    def _keep(self, key: tuple[str, int], lookup: asyncio.Task[Found]) -> None:
        """Remove a failure from the cache at once, and addresses after some seconds."""
        if lookup.cancelled() or lookup.exception() is not None:
            del self._lookups[key]
        else:
            asyncio.get_running_loop().call_later(DNS_TIME, self._lookups.pop, key, None)


async def _look_up(host: str, port: int) -> Found:
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _literal(host: str, port: int) -> Found:
    """Return the result of ``getaddrinfo`` for a literal address, without a thread."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    return []


async def dial(
    origin: Origin,
    resolver: Resolver,
    tls: Callable[[], ssl.SSLContext],
    connection: Connection,
) -> None:
    """Connect to an origin.

    Raises:
        CannotConnect: no connection could be opened.
    """
    proxy = origin.proxy
    target = origin if proxy is None else proxy
    try:
        addresses = await resolver.resolve(target.host, target.port)
        sock = await start_connection(addresses, happy_eyeballs_delay=ATTEMPT_DELAY)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await _secure(sock, origin, tls, connection)
    except ssl.SSLCertVerificationError as error:
        raise Untrusted(error.verify_message) from error
    except OSError as error:  # ssl.SSLError among them
        raise CannotConnect(str(error)) from error
    except UnicodeError as error:  # a name that is too long for DNS
        raise CannotConnect("the host name is malformed") from error


async def _secure(
    sock: socket.socket,
    origin: Origin,
    tls: Callable[[], ssl.SSLContext],
    connection: Connection,
) -> None:
    loop = asyncio.get_running_loop()
    proxy = origin.proxy
    outer: dict[str, Any] = {}
    if proxy is not None and proxy.tls:
        outer = {"ssl": tls(), "server_hostname": proxy.host}
    elif proxy is None and origin.scheme == "https":
        outer = {"ssl": tls(), "server_hostname": origin.server_name}
    if proxy is None or origin.scheme == "http":  # for http a proxy gets the request itself
        await loop.create_connection(lambda: connection, sock=sock, **outer)
        return
    transport, tunnel = await loop.create_connection(_Tunnel, sock=sock, **outer)
    try:
        await tunnel.open(origin, proxy)
        secure = await loop.start_tls(
            transport, connection, tls(), server_hostname=origin.server_name
        )
    except BaseException:
        transport.abort()
        raise
    if secure is None:
        raise ConnectionResetError("the connection closed in the TLS handshake")
    connection.connection_made(secure)


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a connection to another server (RFC 9110 section 9.3.6)."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, origin: Origin, proxy: Proxy) -> None:
        """Open the tunnel.

        Raises:
            ProxyRefused: the status of the proxy's response is not 2xx.
            OSError: the connection to the proxy ended.
        """
        assert self._transport is not None
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        target = f"{host}:{origin.port}".encode("ascii")
        request = b"CONNECT %b HTTP/1.1\r\nhost: %b\r\n" % (target, target)
        if proxy.authorization is not None:
            request += b"proxy-authorization: %b\r\n" % proxy.authorization
        self._transport.write(request + b"\r\n")
        await self._opened

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._opened.done():
            return
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end and len(head) <= MAX_TUNNEL_HEAD:
            return
        status = _STATUS_LINE.match(head + end)
        if not end or status is None or rest:  # a TLS server sends nothing before its client
            self._fail(ProxyRefused("the proxy sent no HTTP response"))
        elif not status[1].startswith(b"2"):
            self._fail(ProxyRefused(f"the proxy answered {status[1].decode()}"))
        else:
            self._opened.set_result(None)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._opened.done():
            self._fail(ConnectionResetError("the proxy closed the connection"))

    def _fail(self, error: Exception) -> None:
        self._opened.set_exception(error)
        self._opened.exception()  # marks it as retrieved: the waiter may have been cancelled
