"""Connections of the checks: a WebSocket that records times, and responses as evidence."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx2
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import Opcode
from websockets.http11 import Response as Handshake
from websockets.protocol import Event
from websockets.typing import Origin, Subprotocol

from wsserver.addresses import is_local
from wsserver.errors import ConfigError
from wsserver.protocol import SUBPROTOCOL

Frame = Mapping[str, Any]

OPEN_TIMEOUT = 10.0  # seconds for TCP, TLS and the handshake
CLOSE_TIMEOUT = 2.0  # seconds for the answer to a close frame
FRAME_SIZE = 16 * 1024 * 1024  # bytes; the server sends less than 1 MiB
BODY_KEPT = 4096  # characters of a response that are evidence
SCHEMES = {"ws": "http", "wss": "https", "http": "http", "https": "https"}


@dataclass(frozen=True, slots=True)
class Target:
    """The addresses of a deployment.

    Attributes:
        host: host name, without a port.
        origin: origin of the pages at this address (RFC 6454), such as ``https://example.com``.
        prefix: path below which the server is mounted; empty for the root.
        path: path of the WebSocket.
    """

    host: str
    origin: str
    prefix: str
    path: str

    @property
    def secure(self) -> bool:
        """Whether clients use TLS."""
        return self.origin.startswith("https")

    @property
    def websocket(self) -> str:
        """Address of the WebSocket."""
        return "ws" + self.origin.removeprefix("http") + self.path

    @property
    def http(self) -> str:
        """Address of the HTTP routes, without a slash at the end."""
        return self.origin + self.prefix


def parse_target(url: str) -> Target:
    """Return the addresses of a deployment.

    Args:
        url: address of the WebSocket or of the page: ``ws``, ``wss``, ``http`` or ``https``.

    Raises:
        ConfigError: this is no such address.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        usable = parts.scheme in SCHEMES and bool(parts.hostname) and url.isprintable()
    except ValueError:
        usable = False
    if not usable or _has_more(parts):
        raise ConfigError(
            "the address must be like wss://chat.example.com/ or http://localhost:3001, without a "
            "user, a query and a fragment"
        )
    host = parts.hostname or ""
    shown = f"[{host}]" if ":" in host else host
    origin = f"{SCHEMES[parts.scheme]}://{shown}" + ("" if port is None else f":{port}")
    origin = origin.removesuffix(":443" if origin.startswith("https") else ":80")
    prefix = parts.path.removesuffix("/ws").rstrip("/")
    return Target(host, origin, prefix, parts.path or "/")


def _has_more(parts: SplitResult) -> bool:
    return bool(parts.query or parts.fragment or "@" in parts.netloc)


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response.

    Attributes:
        status: the status code.
        headers: the headers, names in lower case.
        body: the begin of the body.
    """

    status: int
    headers: Mapping[str, str]
    body: str


class Refused(Exception):
    """A response refuses the handshake."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"status {response.status}")
        self.response = response


class Lost(Exception):
    """The connection was lost or closed."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"close code {code}" if code != 1006 else "no close frame (1006)")  # noqa: PLR2004
        self.code = code
        self.reason = reason


class Declined(Exception):
    """The server refused a frame, or the reply failed."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(f"{frame.get('code')}: {frame.get('message')}")
        self.code = frame.get("code")


class _Socket(ClientConnection):
    """Counts the pings of the server."""

    pings = 0

    def process_event(self, event: Event) -> None:
        if getattr(event, "opcode", None) is Opcode.PING:
            self.pings += 1
        super().process_event(event)


class _Connect(connect):
    """Follows no redirect, as browsers follow none in a WebSocket handshake."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


class Line:
    """An open WebSocket.

    Attributes:
        hello: the ``hello`` of the server; empty if the server sent none.
        response: the response to the handshake.
    """

    def __init__(self, socket: _Socket, response: Response) -> None:
        self._socket = socket
        self.hello: Frame = {}
        self.response = response

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol that the server chose."""
        return self._socket.subprotocol

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS connection."""
        found: ssl.SSLObject | None = self._socket.transport.get_extra_info("ssl_object")
        return found

    @property
    def pings(self) -> int:
        """Number of pings (RFC 6455 section 5.5.2) that have come."""
        return self._socket.pings

    async def ping(self) -> float:
        """Send a ping of WebSocket; return the seconds until its pong."""
        try:
            return await (await self._socket.ping())
        except ConnectionClosed as closed:
            raise _lost(closed) from None

    async def send(self, frame: Frame) -> None:
        """Send a frame."""
        await self.send_text(json.dumps(frame).encode())

    async def send_text(self, text: bytes) -> None:
        """Send a text message of these bytes."""
        try:
            await self._socket.send(text, text=True)
        except ConnectionClosed as closed:
            raise _lost(closed) from None

    async def receive(self) -> Frame:
        """Return the next frame.

        Raises:
            Lost: the connection was lost.
            ValueError: the message is no frame.
        """
        try:
            message = await self._socket.recv()
        except ConnectionClosed as closed:
            raise _lost(closed) from None
        return parse_frame(message)

    async def next(self, *types: str) -> Frame:
        """Skip frames until one of these types, and return it."""
        while True:
            frame = await self.receive()
            if frame["type"] in types:
                return frame

    def cut(self) -> None:
        """Cut the TCP connection, as a network does."""
        self._socket.transport.abort()


def parse_frame(message: str | bytes) -> Frame:
    """Return the frame that is a message.

    Raises:
        ValueError: the message is no frame.
    """
    try:
        frame = json.loads(message)
    except RecursionError:
        frame = None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
        raise ValueError("a message that is no frame")  # noqa: TRY004 - of the protocol
    return frame


def _lost(closed: ConnectionClosed) -> Lost:
    return Lost(closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else Lost(1006, "")


@asynccontextmanager
async def dial(
    target: Target,
    context: ssl.SSLContext | None,
    *,
    headers: Mapping[str, str],
    origin: str | None = None,
    host: str | None = None,
) -> AsyncIterator[Line]:
    """Open a WebSocket, and close it in the end.

    Args:
        target: the deployment.
        context: for TLS.
        headers: further headers.
        origin: the `Origin` header; None for a program.
        host: the `Host` header, if it is not that of the target.

    Raises:
        Refused: a response refuses the handshake.
        OSError, TimeoutError: there is no connection.
        InvalidHandshake: the response is no handshake.
    """
    url = target.websocket
    options: dict[str, Any] = {}
    if host is not None:
        parts = urlsplit(url)
        url = parts._replace(netloc=host).geturl()
        options = {"host": target.host, "port": parts.port or (443 if target.secure else 80)}
    if target.secure:
        options |= {"ssl": context, "server_hostname": target.host}
    try:
        opened = await _Connect(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=headers,
            origin=None if origin is None else Origin(origin),
            compression=None,
            proxy=None if host is not None or is_local(target.host) else True,
            open_timeout=OPEN_TIMEOUT,
            ping_interval=None,
            close_timeout=CLOSE_TIMEOUT,
            max_size=FRAME_SIZE,
            create_connection=_Socket,
            **options,
        )
    except InvalidStatus as error:
        raise Refused(_response(error.response)) from error
    assert isinstance(opened, _Socket)
    assert opened.response is not None
    line = Line(opened, _response(opened.response))
    try:
        if line.subprotocol == SUBPROTOCOL:
            async with asyncio.timeout(OPEN_TIMEOUT):
                line.hello = await line.next("hello")
        yield line
    finally:
        await opened.close()


def _response(found: Handshake) -> Response:
    headers = {name.lower(): value for name, value in found.headers.raw_items()}
    body = bytes(found.body or b"")[:BODY_KEPT].decode(errors="replace")
    return Response(found.status_code, headers, body)


FAILURES = (Refused, Lost, Declined, InvalidHandshake, httpx2.HTTPError, OSError, ValueError)
"""The exceptions of connections that :func:`describe` knows."""


def describe(error: BaseException) -> str:
    """Return in one sentence how a connection failed."""
    match error:
        case Refused():
            found = f"another connection is refused: status {error.response.status}"
        case Lost():
            found = f"the connection is cut: {error}"
        case Declined():
            found = f"the server answers {error}"
        case ssl.SSLCertVerificationError():
            found = f"the certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            found = f"the TLS handshake fails: {error.reason or error}"
        case TimeoutError():
            found = f"nothing answers within {OPEN_TIMEOUT:.0f} s"
        case socket.gaierror():
            found = "the host name has no address"
        case ConnectionRefusedError():
            found = "nothing listens at this port"
        case InvalidHandshake():
            found = f"the answer is no WebSocket handshake: {error}"
        case httpx2.TransportError():
            found = f"a request over HTTP fails: {str(error) or type(error).__name__}"
        case OSError():
            found = f"there is no connection: {error.strerror or error}"
        case _:
            found = f"the answer is not that of a wsserver: {str(error) or type(error).__name__}"
    return found
