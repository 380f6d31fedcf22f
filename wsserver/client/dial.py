"""Opens a WebSocket connection, and decides which failures to retry, and when.

``PROTOCOL.md`` ("Close codes") says which close codes and HTTP statuses are final. The pause before
the next attempt is random, so that the clients of a restarted server do not all connect at once.
"""

import asyncio
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

from wsserver.addresses import is_local
from wsserver.client.failures import ConnectionFailed
from wsserver.protocol import SUBPROTOCOL, Close

FINAL_CLOSE_CODES = frozenset({Close.PROTOCOL_ERROR, Close.INVALID_DATA, Close.POLICY_VIOLATION})
RETRIED_STATUSES = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 15.0  # seconds: upper bounds of the random pauses
ATTEMPT_TIMEOUT = 10.0  # seconds for one attempt
LAST_ATTEMPT_TIMEOUT = 1.0  # seconds for an attempt that begins when the time is over
TOKEN_SIZE = 8192  # characters; the server's limit for a token
FRAME_SIZE = 16 * 1024 * 1024  # bytes; the server sends less than 1 MiB


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds; see :class:`wsserver.client.Chat`."""

    opening: float
    ping: float
    closing: float
    patience: float


class Socket(ClientConnection):
    """A WebSocket connection that records when data arrived."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Time of the last bytes from the server, by the event loop's clock.
        self.last_data_at = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Record the time and process the bytes."""
        self.last_data_at = self.loop.time()
        super().data_received(data)


class AttemptFailed(Exception):
    """An attempt to connect failed; a later one may succeed."""

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status  # HTTP status of the refusal; None if there was no HTTP response
        self.retry_after = retry_after  # seconds that the server asks to wait


class Backoff:
    """Full-jitter back-off: each pause is random, below a bound that doubles with each failure."""

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._failures = 0

    def next(self) -> float:
        """Count a failure and return the pause before the next attempt, in seconds."""
        bound = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return self._uniform(0.0, bound)

    @property
    def failed(self) -> bool:
        """Whether there was a failure since the last :meth:`reset`."""
        return self._failures > 0

    def reset(self) -> None:
        """Forget all failures after a success."""
        self._failures = 0


async def dial(
    url: str,
    token: Callable[[], Awaitable[str | None]],
    timeouts: Timeouts,
    backoff: Backoff,
    deadline: float,
) -> Socket:
    """Open a connection, with as many attempts as the time allows. The last begins at the deadline.

    Args:
        url: the server's address.
        token: called before each attempt; returns the bearer token, or None.
        timeouts: the chat's.
        backoff: chooses the pauses between attempts.
        deadline: when the last attempt begins, by the event loop's clock.

    Raises:
        AttemptFailed: all attempts failed. The exception describes the last one.
        ConnectionFailed: a later attempt cannot succeed.
    """
    loop = asyncio.get_running_loop()
    last_timeout = min(LAST_ATTEMPT_TIMEOUT, timeouts.opening)
    while True:
        left = deadline - loop.time()
        try:
            async with asyncio.timeout(min(ATTEMPT_TIMEOUT, max(last_timeout, left))):
                return await dial_once(url, await token(), timeouts)
        except TimeoutError:
            failed = AttemptFailed("the server did not answer in time")
        except AttemptFailed as error:
            failed = error
        left = deadline - loop.time()
        # An attempt before `retry_after` would be refused.
        if left <= 0 or failed.retry_after > left:
            raise failed
        await asyncio.sleep(min(left, backoff.next() + failed.retry_after))


async def dial_once(url: str, token: str | None, timeouts: Timeouts) -> Socket:
    """Open a connection with one attempt. The caller sets the time limit.

    Raises:
        AttemptFailed: a later attempt may succeed.
        ConnectionFailed: a later attempt cannot succeed.
    """
    if token is not None and not (
        token.isascii() and token.isprintable() and len(token) <= TOKEN_SIZE
    ):
        raise ConnectionFailed("the token is too long, or has characters that are not allowed")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        socket = await open_socket(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=headers,
            compression=None,  # tokens are too short to compress
            proxy=None if is_local(urlsplit(url).hostname or "") else True,
            open_timeout=None,
            ping_interval=None,  # the link sends its own pings
            close_timeout=timeouts.closing,
            max_size=FRAME_SIZE,
            create_connection=Socket,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        reason = bytes(error.response.body or b"").decode(errors="replace").strip()[:500]
        message = reason or f"the server answered with status {status}"
        if status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in RETRIED_STATUSES:
            raise ConnectionFailed(message, status=status) from error
        wait = _parse_retry_after(error.response.headers.get("Retry-After"))
        raise AttemptFailed(message, status, wait) from error
    except ssl.SSLCertVerificationError as error:
        reason = f"the server's certificate is not trusted: {error.verify_message}"
        raise ConnectionFailed(reason) from error
    except (InvalidURI, ValueError) as error:
        shown = without_credentials(url)
        raise ConnectionFailed(f"{shown!r} is not the address of a WebSocket server") from error
    except (OSError, TimeoutError, ProxyError, InvalidProxyStatus) as error:
        raise AttemptFailed(_describe(error)) from error
    except InvalidHandshake as error:
        # A response that breaks off is a lost connection; any other is not a WebSocket server's.
        if isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError):
            raise AttemptFailed("the connection was lost during the handshake") from error
        raise ConnectionFailed(f"this is not a WebSocket server: {error}") from error
    assert isinstance(socket, Socket)
    return socket


def without_credentials(url: str) -> str:
    """Return the address without user name and password."""
    return re.sub(r"//[^/]*@", "//", url)


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _parse_retry_after(header: str | None) -> float:
    """Return the seconds of a ``Retry-After`` (RFC 9110, 10.2.3): a number, or a date; else 0."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
