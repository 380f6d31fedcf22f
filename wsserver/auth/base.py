"""The interface of authenticators: a token and a handshake in, a principal out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from wsserver.logs import log


@dataclass(frozen=True, slots=True)
class Principal:
    """The person or program that a socket acts for.

    Conversations and generations belong to the ``name``. Two principals with the same name are the
    same principal. ``expires`` is the end of the login, in seconds since the epoch; None if the
    login does not expire.
    """

    name: str
    expires: float | None = None

    def __post_init__(self) -> None:
        # The store compares names as texts. An integer from a database would not match after a
        # restart.
        if not (isinstance(self.name, str) and self.name):  # type: ignore[redundant-expr]
            raise TypeError("a Principal's name must be a str that is not empty")


ANONYMOUS = Principal("anonymous")
"""All clients without a login, as one principal. An authenticator may return it for guests."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """The request of a client that connects."""

    address: str  # of the client; behind a proxy of `proxies` the address in X-Forwarded-For
    path: str  # including the query
    headers: Mapping[str, str]  # names in lower case
    scope: Mapping[str, Any] | None = None  # of ASGI, where a parent application has its user


class Unavailable(Exception):
    """The authenticator cannot decide now, for example because its database is down."""


class Authenticator(Protocol):
    """A callable that finds the principal of a client. An ``async def`` function is enough.

    The server calls it at the handshake, with the token of ``Authorization: Bearer`` or with None.
    If it returns None for the token None, the client has to send an ``auth`` frame, and the server
    calls it again with the token of this frame. On a reload the server calls it again for each open
    socket, and closes the sockets for which it returns no principal or another one.

    An authenticator may have ``async def reload() -> bool``, which reads its data again and returns
    whether that worked, and ``async def aclose()``. The server calls both.

    Raises:
        Unavailable: it cannot decide now. Any other exception has the same effect, and is logged.
    """

    async def __call__(self, token: str | None, handshake: Handshake, /) -> Principal | None:
        """Return the principal, or None if the token or handshake names none."""
        ...


async def reload(authenticator: Authenticator) -> bool:
    """Call the authenticator's ``reload``, if it has one; return whether that worked."""
    method = getattr(authenticator, "reload", None)
    return method is None or await method() is not False


async def close(authenticator: Authenticator) -> None:
    """Call the authenticator's ``aclose``, if it has one. An exception is logged."""
    method = getattr(authenticator, "aclose", None)
    if method is None:
        return
    try:
        await method()
    except Exception as error:  # noqa: BLE001
        log.error("authenticator not closed", failure=error)
