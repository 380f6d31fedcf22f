"""Where the keys of JSON Web Tokens come from: a file, or the issuer's address.

What a key set says is read elsewhere; here is when it is read, and what holds when it cannot be.
The rules about an address all have one reason: whoever sends a token must not be able to make
this server ask the issuer more often than it would by itself.
"""

import asyncio
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2

from wsserver.auth.base import Unavailable
from wsserver.errors import ConfigError
from wsserver.logs import log

__all__ = ["FetchedKeys", "FileKeys", "FixedKeys", "Key", "Keys", "Parse"]

FETCH_TIMEOUT = 5.0  # seconds for the whole of one fetch
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
        """Return the keys for a token that none of those from :meth:`get` fits."""
        return self._keys

    async def reload(self) -> bool:
        """Take what has changed since; tell whether it could be read."""
        return True

    async def aclose(self) -> None:
        """Release what is held."""


class FileKeys(FixedKeys):
    """The keys in a file, read at once and then when asked to.

    Raises:
        ConfigError: it cannot be read, or is not a key set.
    """

    def __init__(self, path: Path, parse: Parse) -> None:
        self._path = path
        self._parse = parse
        super().__init__(self._read())

    def _read(self) -> Keys:
        try:
            return self._parse(self._path.read_bytes())
        except OSError as error:
            raise ConfigError(f"jwt_jwks: {self._path}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"jwt_jwks: {self._path}: {error}") from None

    async def reload(self) -> bool:
        """Read the file again. One that is not good changes nothing, and is logged."""
        try:
            self._keys = await asyncio.to_thread(self._read)
        except ConfigError as error:
            log.error("the keys stay as they were", reason=str(error))
            return False
        return True


class FetchedKeys(FixedKeys):
    """The keys at an address: fetched when first needed, and again when they are old or unknown.

    All who wait share one fetch. Where it fails, the keys that there are go on to serve.

    Args:
        address: ``https://…``, or ``http://…`` of this machine.
        parse: makes keys of the document.
        clock: seconds that never go back.

    Raises:
        ConfigError: it is not such an address.
    """

    def __init__(
        self, address: str, parse: Parse, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(())
        self._url = _checked(address)
        self._parse = parse
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
        """Return the keys, and fetch them first where they are missing or old.

        Raises:
            Unavailable: there never were any, and none can be had now.
        """
        if self._clock() - self._fetched >= FRESH:
            await self._fetch(COOLDOWN if self._keys else RETRY)
        if not self._keys:
            raise Unavailable("the issuer's keys cannot be had")
        return self._keys

    async def newer(self) -> Keys:
        """Return the keys, fetched anew unless that was just done."""
        await self._fetch(COOLDOWN)
        return self._keys

    async def reload(self) -> bool:
        """Let the next token have the keys fetched anew."""
        self._fetched = self._tried = float("-inf")
        return True

    async def aclose(self) -> None:
        """End a fetch that is under way, and close the HTTP client."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
        await self._client.aclose()

    async def _fetch(self, cooldown: float) -> None:
        if self._fetching is None:
            if self._clock() - self._tried < cooldown:
                return
            self._tried = self._clock()
            self._fetching = asyncio.create_task(self._refresh())
        # Not awaited itself: who waits may be cancelled, and the others still want the keys.
        await asyncio.wait({self._fetching})

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
