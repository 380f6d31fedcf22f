"""The addresses of a host name, looked up once for connections that are made at the same time."""

import asyncio
import contextlib
import functools
import socket
from typing import Any

__all__ = ["Resolver"]

DNS_TIME = 10.0  # seconds for which the addresses of a name are kept

Found = list[tuple[Any, ...]]
"""The result of :func:`socket.getaddrinfo`."""


class Resolver:
    """Looks names up in DNS, and keeps the addresses for some seconds."""

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
        """Forget a failure at once, and addresses after some seconds."""
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
