"""The HTTP under a model's SDK: requests go out through aiohttp, and bodies come in by callback.

An SDK's stream passes each read through half a dozen coroutines, which costs more than all else
that is done for a token. Here a body's bytes are handed on in the call that reads them from their
socket; aiohttp still makes the connection, keeps it for the next request, and undoes whatever
framing and compression the body has.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import aiohttp
import httpx2

__all__ = ["Body", "Redirected", "Transport"]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SAME_REQUEST = frozenset({307, 308})  # method and body stay as they were
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")


class Redirected(httpx2.TransportError):
    """The API redirects to where a prompt must not be sent."""


class Transport(httpx2.AsyncBaseTransport):
    """Sends an SDK's requests. Its responses have their :class:`Body` as an extension, ``body``.

    The SDK's client follows redirects. It gets 307 and 308 (RFC 9110 sections 15.4.8 and 15.4.9)
    within one origin only: others would send the key or the prompt to another host, or turn the
    request into a GET without a body.

    Args:
        connections: at most, at once.
        proxy: what they go through.

    Raises:
        httpx2.TimeoutException: it took too long to connect.
        httpx2.ConnectError: it failed before there was a response.
        httpx2.RemoteProtocolError: what came is no response.
        Redirected: it is a redirect that must not be followed.
    """

    def __init__(self, connections: int, proxy: httpx2.Proxy | None = None) -> None:
        self._limit = connections
        self._proxy = None if proxy is None else _with_credentials(proxy)
        self._proxy_headers = None if proxy is None else proxy.headers
        self._tls = httpx2.create_ssl_context()
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._limit, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, and return its response as soon as it begins."""
        if self._session is None:
            self._session = self._open()
        timeout = request.extensions["timeout"]
        content = await request.aread()  # a redirected request has only a stream
        try:
            response = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers,
                data=content or None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    connect=timeout["pool"],
                    sock_connect=timeout["connect"],
                    sock_read=timeout["read"],
                ),
                server_hostname=request.extensions.get("sni_hostname"),
                proxy=self._proxy,
                proxy_headers=self._proxy_headers,
            )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout("no response in time", request=request) from error
        except aiohttp.ClientResponseError as error:
            message = "a response that is none"
            raise httpx2.RemoteProtocolError(message, request=request) from error
        except aiohttp.ClientError as error:
            raise httpx2.ConnectError("no response", request=request) from error
        if "location" in response.headers and not _may_follow(request.url, response):
            response.close()
            raise Redirected("a redirect elsewhere", request=request)
        headers = [pair for pair in response.raw_headers if pair[0].lower() != b"content-encoding"]
        body = Body(response)
        return httpx2.Response(
            response.status,
            headers=headers,
            stream=body,
            request=request,
            extensions={"body": body},
        )

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


def _may_follow(url: httpx2.URL, response: aiohttp.ClientResponse) -> bool:
    """Whether a response is no redirect, or one within its origin that keeps method and body."""
    if response.status not in _REDIRECTS:
        return True
    try:
        to = url.join(response.headers["location"])
    except (httpx2.InvalidURL, ValueError):
        return False
    return response.status in _SAME_REQUEST and _origin(to) == _origin(url)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _with_credentials(proxy: httpx2.Proxy) -> str:
    if proxy.auth is None:
        return str(proxy.url)
    user, password = proxy.auth
    return str(proxy.url.copy_with(username=user, password=password))


class Body(httpx2.AsyncByteStream):
    """What a response says, by iteration or, for each read at once, by callback."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise _failure(error) from error

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """Hand on the body, what there is of it now and then each read as it is made.

        Args:
            take: is given some bytes; True says that it has enough. What it raises ends this too.

        Returns:
            Whether the body came to its end, rather than ``take`` having enough.

        Raises:
            httpx2.ReadError: the body was cut.
            httpx2.DecodingError: its compression is damaged.
        """
        response = self._response
        connection = response.connection
        transport = None if connection is None else connection.transport
        headers = response.headers
        plain = "content-encoding" not in headers and headers.get("transfer-encoding") == "chunked"
        tap = _Tap(response.content, take, plain=plain)
        try:
            if transport is not None:
                tap.put_on(transport)
            tap.read()
            return await tap.over
        except aiohttp.ClientError as error:
            raise _failure(error) from error
        finally:
            tap.take_off()

    async def aclose(self) -> None:
        """Give the connection back, or close it if the body has not come to its end."""
        self._response.close()


def _failure(error: aiohttp.ClientError) -> httpx2.RequestError:
    if isinstance(error.__cause__, aiohttp.http_exceptions.ContentEncodingError):
        return httpx2.DecodingError("the body's compression is damaged")
    return httpx2.ReadError("the body was cut")


class _Tap(asyncio.Protocol):
    """Stands between a connection and aiohttp's protocol, and takes what that makes of each read.

    Where it can tell itself what that would be, aiohttp is not asked, and knows nothing of the
    chunks that have gone past it: it is between two chunks before them and after.

    Args:
        content: where aiohttp's protocol leaves the body.
        take: is given it, and says when it has enough.
        plain: whether the body is chunked, and nothing else is done to it.

    Attributes:
        over: done when nothing more is to be read: whether the body has come to its end.
    """

    def __init__(
        self, content: aiohttp.StreamReader, take: Callable[[bytes], bool], *, plain: bool
    ) -> None:
        self._content = content
        self._take = take
        self._plain = plain
        self._between_chunks = False  # aiohttp's parser, as far as is known
        self._transport: asyncio.Transport | None = None
        self._protocol: asyncio.Protocol
        self.over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def put_on(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._protocol = transport.get_protocol()  # type: ignore[assignment]
        transport.set_protocol(self)

    def take_off(self) -> None:
        if self._transport is not None:
            self._transport.set_protocol(self._protocol)
            self._transport = None

    def data_received(self, data: bytes) -> None:
        said = _in_whole_chunks(data) if self._plain else None
        if said is not None and self._between_chunks:
            self._hand_on(said)
            return
        self._protocol.data_received(data)
        # If it made the same of it, it is where we think that it is.
        self._between_chunks = self.read() == said

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
        self.read()
        if not self.over.done():  # after some faults of the framing, aiohttp says nothing more
            self.over.set_exception(httpx2.ReadError("the body was cut"))

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def read(self) -> bytes:
        """Hand on what aiohttp has made of what has arrived, and return it."""
        content, over, found = self._content, self.over, b""
        try:
            # To read makes room, which may let aiohttp decompress some more at once.
            while not over.done() and (data := content.read_nowait()):
                found += data
                self._hand_on(data)
            if not over.done() and content.is_eof():
                over.set_result(True)
        except Exception as error:  # noqa: BLE001
            if not over.done():
                over.set_exception(error)
        if over.done() and content.is_eof():
            self.take_off()  # its connection serves another request from now on
        return found

    def _hand_on(self, data: bytes) -> None:
        over = self.over
        if over.done():
            return
        try:
            if self._take(data) and not over.done():
                over.set_result(False)
        except Exception as error:  # noqa: BLE001
            if not over.done():  # and not stopped because of what it has said
                over.set_exception(error)


def _in_whole_chunks(data: bytes) -> bytes | None:
    """Return what is in some bytes if they are nothing but whole chunks (RFC 9112 section 7.1).

    None where they are not, where one is the last, and where a chunk has extensions.
    """
    found = []
    position = 0
    while position < len(data):
        size = _CHUNK_SIZE.match(data, position)
        if size is None:
            return None
        end = size.end() + int(size[1], 16)
        if end == size.end() or data[end : end + 2] != b"\r\n":
            return None
        found.append(data[size.end() : end])
        position = end + 2
    return b"".join(found) or None
