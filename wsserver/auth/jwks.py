"""Reads or fetches the keys of JSON Web Tokens, and caches them.

``auth.jwt`` parses the keys. A client with invalid tokens must not make this server send more
requests to the issuer: this is the reason for the rules of :class:`FetchedKeys`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx2

from wsserver.addresses import ip_address
from wsserver.auth.base import Unavailable
from wsserver.errors import ConfigError
from wsserver.logs import log

FETCH_TIMEOUT = 5.0  # seconds for a whole fetch
PATIENCE = 2.0  # seconds that a login waits for a fetch; the fetch itself continues
MAX_DOCUMENT = 256 * 1024  # bytes; the key sets of large issuers have a few thousand bytes
FRESH = 3600.0  # seconds until keys are fetched again, so that withdrawn keys become invalid
COOLDOWN = 30.0  # seconds between two fetches while keys are known
RETRY = 5.0  # seconds between two fetches while no key is known


@dataclass(frozen=True, slots=True)
class Key:
    """A key and its algorithms. The kind of key decides the algorithms."""

    kid: str | None
    algorithms: tuple[str, ...]
    material: Any = field(repr=False)


Keys = tuple[Key, ...]
Parse = Callable[[bytes], Keys]  # returns at least one key, or raises ValueError


class ReadKeys:
    """Keys that are read at the start and on each reload.

    Args:
        read: reads the keys, or raises ConfigError.

    Raises:
        ConfigError: ``read`` raised it.
    """

    def __init__(self, read: Callable[[], Keys]) -> None:
        self._read = read
        self._keys = read()

    async def get(self) -> Keys:
        """Return the keys."""
        return self._keys

    newer = get

    async def reload(self) -> bool:
        """Read the keys again. Invalid keys change nothing, and are logged."""
        try:
            self._keys = await asyncio.to_thread(self._read)
        except ConfigError as error:
            log.error("keys not reloaded", reason=str(error))
            return False
        return True

    async def aclose(self) -> None:
        """Nothing to release."""


class FetchedKeys:
    """Keys at a URL, fetched at the first login, when they are old, and for an unknown key.

    All logins share one fetch. The server renews old keys in the background, and uses the known
    keys while the issuer fails or hangs. A login waits only if no key is known, if no key verifies
    its token, or after two hours without a login.

    Args:
        address: ``https://…``, or ``http://…`` of this machine.
        parse: parses the document.
        patience: longest wait of a login, in seconds.
        clock: monotonic clock, in seconds.

    Raises:
        ConfigError: the address is not allowed.
    """

    def __init__(
        self,
        address: str,
        parse: Parse,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self._keys: Keys = ()
        self._url = _checked(address)
        self._parse = parse
        self._patience = patience
        self._clock = clock
        self._fetched = self._tried = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._down = False
        self._client = httpx2.AsyncClient(
            timeout=FETCH_TIMEOUT,
            follow_redirects=False,  # the operator trusts this address only
            # With http:// a proxy of the environment would see the request unencrypted.
            trust_env=self._url.scheme == "https",
            limits=httpx2.Limits(max_keepalive_connections=0),
            # Uncompressed, so that MAX_DOCUMENT bounds the memory too.
            headers={"accept": "application/json", "accept-encoding": "identity"},
        )

    async def get(self) -> Keys:
        """Return the keys; fetch them first if no key is known.

        Raises:
            Unavailable: no key is known, and none can be fetched now.
        """
        now = self._clock()
        if not self._keys:
            await self._wait_for(self._fetch(RETRY))
        elif now - self._fetched >= FRESH:
            # During a long pause keys may have been withdrawn: wait for the fetch.
            idle = self._fetching is None and now - self._tried >= 2 * FRESH
            fetching = self._fetch(COOLDOWN)
            if idle:
                await self._wait_for(fetching)
        if not self._keys:
            raise Unavailable("the issuer's keys cannot be fetched")
        return self._keys

    async def newer(self) -> Keys:
        """Return the keys for a token that no key from :meth:`get` verifies.

        They are fetched again, unless the last fetch was a few seconds ago.

        Raises:
            Unavailable: the issuer fails or hangs, and may have newer keys.
        """
        await self._wait_for(self._fetch(COOLDOWN))
        if self._down or self._fetching is not None:
            raise Unavailable("the issuer's newer keys cannot be fetched")
        return self._keys

    async def reload(self) -> bool:
        """Fetch the keys again; return whether that worked. A failure is logged."""
        self._down, self._tried = False, float("-inf")
        if (fetching := self._fetch(0)) is not None:
            await asyncio.wait({fetching})
        return not self._down

    async def aclose(self) -> None:
        """Cancel a running fetch, and close the HTTP client."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
        await self._client.aclose()

    def _fetch(self, cooldown: float) -> asyncio.Task[None] | None:
        """Return the running fetch. Start one if the last fetch is at least ``cooldown`` ago."""
        now = self._clock()
        if self._fetching is None and now - self._tried >= cooldown:
            self._tried = now
            self._fetching = asyncio.create_task(self._refresh())
        return self._fetching

    async def _wait_for(self, fetching: asyncio.Task[None] | None) -> None:
        if fetching is not None:
            # asyncio.wait does not cancel the fetch if this login is cancelled: others wait too.
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
        if not self._down:  # one line per outage
            rest = "; known keys stay in use" if self._keys else ""
            # Only the host: the rest of an address may contain a secret.
            log.warning(f"keys not fetched{rest}", host=self._url.host, reason=reason)
        self._down = True


def _checked(address: str) -> httpx2.URL:
    try:
        url = httpx2.URL(address)
    except (httpx2.InvalidURL, ValueError):
        raise ConfigError("jwt_jwks: not an address") from None
    if url.userinfo or not url.host:
        raise ConfigError("jwt_jwks: the address needs a host, and no user")
    local = url.host == "localhost" or getattr(ip_address(url.host), "is_loopback", False)
    if url.scheme == "https" or (url.scheme == "http" and local):
        return url
    # Someone who can change an unencrypted response could replace the keys.
    raise ConfigError("jwt_jwks: the address must be https://, or http:// of this machine")
