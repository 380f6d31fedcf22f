"""Getting a connection: what to try again, and when.

``PROTOCOL.md`` says which close codes and HTTP statuses are final. Between two attempts there is a
random time, so that all clients of a server that restarted do not come back at once.
"""

import asyncio
import ipaddress
import math
import random
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_socket
from websockets.exceptions import (
    InvalidHandshake,
    InvalidMessage,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)
from websockets.typing import Subprotocol

from wsserver.client.failures import ConnectionFailed
from wsserver.protocol import SUBPROTOCOL, Close

__all__ = ["FINAL", "Pause", "Socket", "Timeouts", "Unreached", "dial", "reach", "shown"]

FINAL = frozenset({Close.PROTOCOL_ERROR, Close.INVALID_DATA, Close.POLICY_VIOLATION})
PASSING = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)
SHORTEST, LONGEST = 0.5, 15.0  # seconds: bounds of the first pause, and of the last
ATTEMPT = 10.0  # seconds for one attempt
LAST_ATTEMPT = 1.0  # seconds at most for an attempt at the very end
LONGEST_TOKEN = 8192  # characters, as the server has it
LARGEST = 16 * 1024 * 1024  # bytes of a frame; the server sends less than 1 MiB at once


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, as :func:`wsserver.client.connect` takes them."""

    opening: float
    ping: float
    closing: float
    patience: float


class Socket(ClientConnection):
    """A WebSocket that knows when something came from the server.

    Attributes:
        heard: when bytes came last, by the event loop's clock.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heard = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Note the time, and take the bytes."""
        self.heard = self.loop.time()
        super().data_received(data)


class Unreached(Exception):
    """There is no connection this time. ``after``: seconds that the server asks to wait for."""

    def __init__(self, message: str, status: int | None = None, after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.after = after


class Pause:
    """Full jitter: between 0 and a bound that doubles with each failure."""

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._failures = 0

    def next(self) -> float:
        """Return how many seconds to wait after one more failure."""
        bound = min(LONGEST, SHORTEST * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return self._uniform(0.0, bound)

    @property
    def is_shortest(self) -> bool:
        """Whether nothing went wrong since it went well."""
        return self._failures == 0

    def reset(self) -> None:
        """Begin again with the shortest, as it went well."""
        self._failures = 0


async def reach(
    url: str,
    token: Callable[[], Awaitable[str | None]],
    timeouts: Timeouts,
    pause: Pause,
    until: float,
) -> Socket:
    """Open a connection, with as many attempts as it takes. The last one begins at the end.

    Args:
        url: where to.
        token: gives what says who the client is, for each attempt.
        timeouts: those of the chat.
        pause: between the attempts.
        until: when to give up, by the event loop's clock.

    Raises:
        Unreached: there is no connection in time; tells why the last attempt failed.
        ConnectionFailed: no later attempt can succeed.
    """
    loop = asyncio.get_running_loop()
    last_attempt = min(LAST_ATTEMPT, timeouts.opening)
    while True:
        left = until - loop.time()
        try:
            async with asyncio.timeout(min(ATTEMPT, max(last_attempt, left))):
                return await dial(url, await token(), timeouts)
        except TimeoutError:
            unreached = Unreached("no answer in time")
        except Unreached as error:
            unreached = error
        left = until - loop.time()
        # A server that asks for more time than there is would refuse the last attempt too.
        if left <= 0 or unreached.after > left:
            raise unreached
        await asyncio.sleep(min(left, pause.next() + unreached.after))


async def dial(url: str, token: str | None, timeouts: Timeouts) -> Socket:
    """Open a connection. The caller bounds the time.

    Raises:
        Unreached: not now.
        ConnectionFailed: never.
    """
    if token is not None and not (
        token.isascii() and token.isprintable() and len(token) <= LONGEST_TOKEN
    ):
        raise ConnectionFailed("the token is too long, or has characters that no token has")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        socket = await open_socket(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=headers,
            compression=None,  # a token is too short to be worth it
            proxy=None if _on_this_machine(url) else True,
            open_timeout=None,
            ping_interval=None,  # the link asks for signs of life by itself
            close_timeout=timeouts.closing,
            max_size=LARGEST,
            create_connection=Socket,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        reason = bytes(error.response.body or b"").decode(errors="replace").strip()[:500]
        message = reason or f"the server answered with status {status}"
        if status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in PASSING:
            raise ConnectionFailed(message, status=status) from error
        wait = _seconds(error.response.headers.get("Retry-After"))
        raise Unreached(message, status, wait) from error
    except ssl.SSLCertVerificationError as error:
        reason = f"the server's certificate is not trusted: {error.verify_message}"
        raise ConnectionFailed(reason) from error
    except (InvalidURI, ValueError) as error:
        raise ConnectionFailed(f"{shown(url)!r} is no address of a WebSocket server") from error
    except (OSError, TimeoutError, ProxyError, InvalidProxyStatus) as error:
        raise Unreached(_reason(error)) from error
    except InvalidHandshake as error:
        # One that was cut in the middle of it; anything else is no WebSocket server.
        if isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError):
            raise Unreached("the connection was lost while it was opened") from error
        raise ConnectionFailed(f"this is no WebSocket server: {error}") from error
    assert isinstance(socket, Socket)
    return socket


def shown(url: str) -> str:
    """Return an address as it may be shown: without a user's name and password."""
    return re.sub(r"//[^/]*@", "//", url)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _on_this_machine(url: str) -> bool:
    """Whether an address is loopback's, to which no proxy leads."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _seconds(retry_after: str | None) -> float:
    """Return what a ``Retry-After`` asks for, in seconds or as a date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
