"""Authentication: finds the principal that a client acts for."""

from pathlib import Path

from wsserver.auth.base import (
    ANONYMOUS,
    Authenticator,
    Handshake,
    Principal,
    Unavailable,
    close,
    reload,
)
from wsserver.auth.tokens import Tokens
from wsserver.settings import Settings

__all__ = [
    "ANONYMOUS",
    "Authenticator",
    "Handshake",
    "Principal",
    "Unavailable",
    "close",
    "make",
    "reload",
]


def make(settings: Settings) -> Authenticator | None:
    """Make the authenticator of the settings: tokens, JSON Web Tokens, both, or None.

    Raises:
        ConfigError: the settings are invalid.
    """
    ways: list[Authenticator] = []
    file = settings.token_file
    if settings.tokens or file:
        ways.append(Tokens(settings.tokens, Path(file) if file else None))
    if settings.jwt_secret.get_secret_value() or settings.jwt_secret_file or settings.jwt_jwks:
        from wsserver.auth.jwt import JwtAuthenticator  # noqa: PLC0415

        ways.append(JwtAuthenticator(settings))
    return _Any(ways) if len(ways) > 1 else ways[0] if ways else None


class _Any:
    """Accepts a client that one of several authenticators accepts."""

    def __init__(self, ways: list[Authenticator]) -> None:
        self._ways = ways

    async def __call__(self, token: str | None, handshake: Handshake, /) -> Principal | None:
        unavailable = None
        for way in self._ways:
            try:
                principal = await way(token, handshake)
            except Unavailable as error:
                unavailable = error
            else:
                if principal is not None:
                    return principal
        if unavailable is not None:
            raise unavailable
        return None

    async def reload(self) -> bool:
        return all([await reload(way) for way in self._ways])

    async def aclose(self) -> None:
        for way in self._ways:
            await close(way)
