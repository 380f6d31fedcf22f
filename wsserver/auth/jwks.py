"""When the keys of JSON Web Tokens are read, and which keys hold when they cannot be.

What a file or a key set says is read elsewhere.
The rules about an address all have one reason: whoever sends a token must not be able to make
this server ask the issuer more often than it would by itself.
"""

import asyncio
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx2

from wsserver.auth.base import Unavailable
from wsserver.errors import ConfigError
from wsserver.logs import log

__all__ = ["FetchedKeys", "FixedKeys", "Key", "Keys", "Parse", "ReadKeys"]

FETCH_TIMEOUT = 5.0  # seconds for the whole of one fetch
PATIENCE = 2.0  # seconds that a token waits for a fetch; the fetch goes on without the token
MAX_DOCUMENT = 256 * 1024  # bytes; the key sets of large issuers have a few thousand
FRESH = 3600.0  # seconds after which keys are fetched anew, so that a withdrawn one ends
COOLDOWN = 30.0  # seconds between two fetches while there are keys
RETRY = 5.0  # seconds between two fetches while there are none, when nobody can get in


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the algorithms that it may be used with, which its kind alone decides."""

    kid: str | None
    algorithms: tuple[str, ...]
    material: Any = field(repr=False)


Keys = tuple[Key, ...]
Parse = Callable[[bytes], Keys]  # never none at all; raises ValueError with a reason of ours


class FixedKeys:
    """Keys that stay as they are; the rest of this module knows others."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def get(self) -> Keys:
        """Return the keys.

        Raises:
            Unavailable: there never were any.
        """
        return self._keys

    async def newer(self) -> Keys:
        """Return the keys for a token that none of those from :meth:`get` fits.

        Raises:
            Unavailable: there may be newer ones, and they cannot be had now.
        """
        return self._keys

    async def reload(self) -> bool:
        """Take what has changed since; tell whether it could be read."""
        return True

    async def aclose(self) -> None:
        """Release what is held."""


class ReadKeys(FixedKeys):
    """Keys that are read at once, and again when asked to.

    Args:
        read: reads the keys; raises ConfigError where it cannot.

    Raises:
        ConfigError: as ``read``.
    """

    def __init__(self, read: Callable[[], Keys]) -> None:
        self._read = read
        super().__init__(read())

    async def reload(self) -> bool:
        """Read the keys again. Such as cannot be used change nothing, and are logged."""
        try:
            self._keys = await asyncio.to_thread(self._read)
        except ConfigError as error:
            log.error("the keys stay as they were", reason=str(error))
            return False
        return True


class FetchedKeys(FixedKeys):
    """The keys at an address: fetched when first needed, and again when they are old or unknown.

    All tokens share one fetch. While the issuer fails or hangs, the keys that there are go on to
    serve: old keys are renewed in the background. A token waits only where no keys are there, where
    none of them fits it, or where nobody has asked for keys in two hours.

    Args:
        address: ``https://…``, or ``http://…`` of this machine.
        parse: makes keys of the document.
        patience: the longest wait of a token, in seconds.
        clock: seconds that never go back.

    Raises:
        ConfigError: it is not such an address.
    """

    def __init__(
        self,
        address: str,
        parse: Parse,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(())
        self._url = _checked(address)
        self._parse = parse
        self._patience = patience
        self._clock = clock
        self._fetched = self._tried = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._down = False
        self._client = httpx2.AsyncClient(
            timeout=FETCH_TIMEOUT,
            follow_redirects=False,  # the address that was named is the one that is trusted
            # A proxy from the environment would carry what is not encrypted off this machine.
            trust_env=self._url.scheme == "https",
            limits=httpx2.Limits(max_keepalive_connections=0),
            # As it comes, so that the limit holds for what was sent and nothing can swell here.
            headers={"accept": "application/json", "accept-encoding": "identity"},
        )

    async def get(self) -> Keys:
        """Return the keys; fetch them first where there are none.

        Raises:
            Unavailable: there never were any, and none can be had now.
        """
        now = self._clock()
        if not self._keys:
            await self._wait_for(self._fetch(RETRY))
        elif now - self._fetched >= FRESH:
            # A key may have been withdrawn long ago, and nobody has looked since.
            idle = self._fetching is None and now - self._tried >= 2 * FRESH
            fetching = self._fetch(COOLDOWN)
            if idle:
                await self._wait_for(fetching)
        if not self._keys:
            raise Unavailable("the issuer's keys cannot be had")
        return self._keys

    async def newer(self) -> Keys:
        """Return the keys, fetched anew unless that was just done.

        Raises:
            Unavailable: the issuer fails or hangs, and may have newer ones.
        """
        await self._wait_for(self._fetch(COOLDOWN))
        if self._down or self._fetching is not None:
            raise Unavailable("the issuer's newer keys cannot be had")
        return self._keys

    async def reload(self) -> bool:
        """Fetch the keys anew; tell whether that worked. If it did not, the log says why."""
        self._down, self._tried = False, float("-inf")
        if (fetching := self._fetch(0)) is not None:
            await asyncio.wait({fetching})
        return not self._down

    async def aclose(self) -> None:
        """End a fetch that is under way, and close the HTTP client."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
        await self._client.aclose()

    def _fetch(self, cooldown: float) -> asyncio.Task[None] | None:
        """Return the fetch that is under way, begun here unless the last one was just now."""
        now = self._clock()
        if self._fetching is None and now - self._tried >= cooldown:
            self._tried = now
            self._fetching = asyncio.create_task(self._refresh())
        return self._fetching

    async def _wait_for(self, fetching: asyncio.Task[None] | None) -> None:
        if fetching is not None:
            # Not awaited itself: the token may be cancelled, and other tokens want the keys.
            await asyncio.wait({fetching}, timeout=self._patience)

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                document = await self._download()
            self._keys = self._parse(document)
        except (TimeoutError, httpx2.TimeoutException):
            self._failed(f"no answer within {FETCH_TIMEOUT:g} s")
        except (httpx2.HTTPError, OSError) as error:
            self._failed(type(error).__name__)
        except ValueError as error:
            self._failed(str(error))
        else:
            self._fetched = self._clock()
            if self._down:
                log.info("keys fetched again", host=self._url.host)
            self._down = False
        finally:
            self._fetching = None

    async def _download(self) -> bytes:
        async with self._client.stream("GET", self._url) as response:
            if response.status_code != HTTPStatus.OK:
                raise ValueError(f"status {response.status_code}")
            document = bytearray()
            async for chunk in response.aiter_raw():
                document += chunk
                if len(document) > MAX_DOCUMENT:
                    raise ValueError(f"over {MAX_DOCUMENT} bytes")
        return bytes(document)

    def _failed(self, reason: str) -> None:
        if not self._down:  # once per outage
            rest = "; the keys stay as they were" if self._keys else ""
            # The host alone, as the rest of an address may hold what is not for a log.
            log.warning(f"cannot fetch keys{rest}", host=self._url.host, reason=reason)
        self._down = True


def _checked(address: str) -> httpx2.URL:
    try:
        url = httpx2.URL(address)
    except (httpx2.InvalidURL, ValueError):
        raise ConfigError("jwt_jwks: that is not an address") from None
    if url.userinfo or not url.host:
        raise ConfigError("jwt_jwks: the address needs a host, and no user")
    if url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.host)):
        return url
    # Whoever can change what comes over the wire could sign for anybody.
    raise ConfigError("jwt_jwks: the address must be https://, or http:// of this machine")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
