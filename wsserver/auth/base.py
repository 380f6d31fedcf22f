"""What authentication is: from a token and a handshake to a principal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from wsserver.logs import log

__all__ = [
    "ANONYMOUS",
    "Authenticator",
    "Handshake",
    "Principal",
    "Unavailable",
    "close",
    "reload",
]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a socket acts for. ``expires``: seconds since the epoch at which that ends, if it does.

    Conversations and generations belong to the ``name``: two principals of one name are one.
    """

    name: str
    expires: float | None = None

    def __post_init__(self) -> None:
        # What is no text, such as a number from a database, would not be found again after a
        # restart; "" is nobody.
        if not (isinstance(self.name, str) and self.name):  # type: ignore[redundant-expr]
            raise TypeError("a Principal's name is a text, and not an empty one")


ANONYMOUS = Principal("anonymous")
"""All who need not say who they are, together; an authenticator may return it for guests."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """What is known of a client when it connects."""

    address: str  # of the client; behind a listed proxy that which the proxy tells
    path: str  # with the query
    headers: Mapping[str, str]  # names in lower case


class Unavailable(Exception):
    """Who it is cannot be found out now: neither yes nor no."""


class Authenticator(Protocol):
    """A callable that tells who a client is; an ``async def`` will do.

    It is called at the handshake, with the token of ``Authorization: Bearer`` or None. Where it
    returns nobody for None, the client has to send an ``auth`` frame, and it is called again with
    that one's token; and once more for each open socket on a reload, to see who has been shut out.

    It may have ``async def reload() -> bool``, which reads anew what it goes by and tells whether
    it could, and ``async def aclose()``; the server calls them.

    Raises:
        Unavailable: it cannot tell now. Any other exception means the same, and is logged.
    """

    async def __call__(self, token: str | None, handshake: Handshake, /) -> Principal | None:
        """Return who it is, or None for nobody whom it knows."""
        ...


async def reload(authenticator: Authenticator) -> bool:
    """Have it read anew what it goes by, if it says how; return whether it could."""
    method = getattr(authenticator, "reload", None)
    return method is None or await method() is not False


async def close(authenticator: Authenticator) -> None:
    """Release what it holds, if it says how. An error of its own is logged."""
    method = getattr(authenticator, "aclose", None)
    if method is None:
        return
    try:
        await method()
    except Exception as error:  # noqa: BLE001
        log.error("authenticator not closed", failure=error)
