"""The HTTP client for a model's API: POST requests from a template, over a pool of connections.

No request is sent twice if the server may have received it: POST is not idempotent (RFC 9110
section 9.2.2), and the API would bill both requests. The pool checks an idle connection just before
its use, and replaces it if it was closed. If a connection ends after the request was written, the
request fails.
"""

import asyncio
import contextlib
import re
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from urllib.parse import quote, urljoin, urlsplit

from wsserver.errors import WsserverError
from wsserver.models.dial import CannotConnect, ConnectTimeout, Origin, Resolver, dial
from wsserver.models.h1 import Connection
from wsserver.models.proxy import PORTS
from wsserver.models.response import Accept, HttpError, Response

IDLE_TIME = 60.0  # seconds: less than NATs and load balancers keep a silent connection
MAX_REDIRECTS = 20

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SAME_REQUEST = frozenset({307, 308})  # method and body stay as they are
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")  # RFC 9110 section 5.5
_SAFE = "!$%&'()*+,/:;=?@~"  # in a path and its query, with escapes that are there already
_SET_HERE = frozenset({b"connection", b"content-length", b"transfer-encoding", b"keep-alive"})


class Redirected(HttpError):
    """A redirect to another origin, one that would lose the prompt, or too many redirects."""


class InvalidRequest(WsserverError):
    """A header has characters that no header may have."""


@dataclass(frozen=True, slots=True)
class Template:
    """The parts that all requests share: the server, the path and the headers."""

    origin: Origin
    target: bytes  # path and query
    headers: bytes  # the lines of the headers

    @classmethod
    def make(
        cls, origin: Origin, target: bytes, headers: Iterable[tuple[bytes, bytes]]
    ) -> "Template":
        """Make a template from the headers of a request, without its framing headers.

        Raises:
            InvalidRequest: a header has characters that no header may have.
        """
        lines = []
        for name, value in headers:
            if not (_TOKEN.fullmatch(name) and _VALUE.fullmatch(value)):
                raise InvalidRequest(f"the header {name.decode('latin-1')!r} is malformed")
            if name.lower() not in _SET_HERE:
                lines.append(b"%b: %b\r\n" % (name, value))
        proxy = origin.proxy
        if proxy is not None and proxy.authorization is not None and origin.scheme == "http":
            lines.append(b"proxy-authorization: %b\r\n" % proxy.authorization)
        return cls(origin, target, b"".join(lines))

    def head(self, size: int) -> bytes:
        """Return the request line and the headers for a body of ``size`` bytes."""
        target = self.target
        if self.origin.proxy is not None and self.origin.scheme == "http":
            target = self.url.encode("ascii")  # RFC 9112 section 3.2.2
        return b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n" % (target, self.headers, size)

    def redirected(self, location: bytes) -> "Template":
        """Return the template for another path of the same origin.

        Raises:
            Redirected: the location is another origin, or no URL.
        """
        try:
            url = urlsplit(urljoin(self.url, location.decode("latin-1")))
            origin = (url.scheme, url.hostname, url.port or PORTS.get(url.scheme))
        except ValueError as error:
            raise Redirected("the redirect has no URL") from error
        if origin != (self.origin.scheme, self.origin.host, self.origin.port):
            raise Redirected("the redirect is to another origin")
        target = quote(
            f"{url.path or '/'}?{url.query}".removesuffix("?"), safe=_SAFE, encoding="latin-1"
        )
        return replace(self, target=target.encode("ascii"))

    @property
    def url(self) -> str:
        """The URL of the requests, without credentials."""
        origin = self.origin
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        port = "" if origin.port == PORTS[origin.scheme] else f":{origin.port}"
        return f"{origin.scheme}://{host}{port}{self.target.decode('ascii')}"


class Pool:
    """Connections to the API, kept alive from one request to the next.

    Args:
        limit: connections at most.
        connect_timeout: seconds to open a connection, or to wait for a free one.
        tls: returns the TLS context.
    """

    def __init__(
        self, limit: int, connect_timeout: float, tls: Callable[[], ssl.SSLContext]
    ) -> None:
        self._limit = limit
        self._connect_timeout = connect_timeout
        self._tls = tls
        self._resolver = Resolver()
        self._connections: dict[Connection, Origin] = {}  # including those that are being opened
        self._dialing = 0  # connections that are being opened
        # The connection that was used last is the last. Its timer closes it.
        self._idle: dict[Connection, asyncio.TimerHandle] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()  # requests that wait for a connection
        self._warming: asyncio.Task[None] | None = None  # opens a connection before a request
        self._warming_taken = False  # a request waits for that connection
        self._closed = False

    async def post(self, template: Template, body: bytes, accept: Accept | None = None) -> Response:
        """Send a request, and return its response as soon as the response begins.

        Redirects 307 and 308 within the origin are followed (RFC 9110 sections 15.4.8 and 15.4.9).
        Any other redirect would send the key or the prompt to another server, or lose the prompt.

        Args:
            template: the server, the path and the headers.
            body: the body.
            accept: decides about the response's body; see :data:`wsserver.models.response.Accept`.

        Raises:
            CannotConnect: no connection could be opened.
            NoResponse: the connection ended before the response began.
            MalformedResponse: the response is malformed.
            Redirected: a redirect cannot be followed.
        """
        for _ in range(MAX_REDIRECTS):
            connection = await self._acquire(template.origin)
            response = await connection.send(template.head(len(body)), body, accept)
            location = response.header(b"location")
            if response.status not in _REDIRECTS or location is None:
                return response
            try:
                if response.status not in _SAME_REQUEST:
                    raise Redirected("the redirect would lose the prompt")
                template = template.redirected(location)
            except Redirected:
                await response.aclose()
                raise
            response.release()
        raise Redirected("too many redirects")

    async def warm(self, origin: Origin) -> None:
        """Open a connection, unless one is idle or being opened. The next request waits for it.

        A failure is not raised: the next request opens its own connection.
        """
        if self._warming is None:
            if self._closed or self._dialing or self._full or self._has_idle(origin):
                return
            self._warming_taken = False
            self._warming = asyncio.get_running_loop().create_task(self._warm(origin))
        await asyncio.wait({self._warming})

    async def aclose(self) -> None:
        """Close all connections."""
        self._closed = True
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.wait({self._warming})
        for connection in tuple(self._connections):
            connection.abort()
            await connection.wait_closed()
        await self._resolver.aclose()

    @property
    def _full(self) -> bool:
        return len(self._connections) >= self._limit

    async def _acquire(self, origin: Origin) -> Connection:
        connection = self._pop_idle(origin)
        if connection is not None:
            return connection
        try:
            async with asyncio.timeout(self._connect_timeout):
                while True:
                    if self._warming is not None and not self._warming_taken:
                        self._warming_taken = True  # the next request opens its own connection
                        await asyncio.wait({self._warming})
                    elif not self._full:
                        return await self._dial(origin)
                    else:
                        await self._wait()
                    connection = self._pop_idle(origin)
                    if connection is not None:
                        return connection
        except TimeoutError as error:
            raise ConnectTimeout("no connection in time") from error

    async def _dial(self, origin: Origin) -> Connection:
        if self._closed:
            raise CannotConnect("the pool is closed")
        connection = Connection(self)
        self._connections[connection] = origin
        self._dialing += 1
        try:
            await dial(origin, self._resolver, self._tls, connection)
        except BaseException:
            self.on_lost(connection)
            raise
        finally:
            self._dialing -= 1
        return connection

    async def _warm(self, origin: Origin) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                self.on_free(await self._dial(origin))
        except (CannotConnect, TimeoutError):
            pass
        finally:
            self._warming = None

    def _has_idle(self, origin: Origin) -> bool:
        return any(self._connections[idle] == origin and idle.usable for idle in self._idle)

    async def _wait(self) -> None:
        """Wait until a connection may be free."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # the next waiter gets the connection that this one does not use
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _pop_idle(self, origin: Origin) -> Connection | None:
        """Return the idle connection that was used last: it is the least likely to be closed.

        Connections to another origin are closed. The origin changes only with the credentials.
        """
        while self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
            if self._connections.get(connection) == origin and connection.usable:
                return connection
            connection.abort()
        return None

    # For the connections.

    def on_free(self, connection: Connection) -> None:
        """Keep a connection for the next request, but not longer than the server does."""
        if connection in self._connections:  # else it has closed in the meantime
            seconds = min(IDLE_TIME, connection.keep_alive)
            loop = asyncio.get_running_loop()
            self._idle[connection] = loop.call_later(seconds, connection.abort)
            self._wake()

    def on_lost(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._connections.pop(connection, None)
        if (timer := self._idle.pop(connection, None)) is not None:
            timer.cancel()
        self._wake()
