"""Bearer tokens: gets a token from the user's function, sends it, and renews it in time."""

import asyncio
import contextlib
import time
from asyncio import sleep
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wsserver.client.dial import AttemptFailed
from wsserver.client.failures import ServerError, parse_seconds
from wsserver.client.link import Link, Request, is_refusal
from wsserver.protocol import Auth

Token = str | Callable[[], Awaitable[str]]
"""A bearer token, or a function that returns a fresh one at each call."""

RENEW_AT = 0.8  # part of a token's remaining life
SHORTEST_RENEWAL = 1.0  # seconds between two renewals


@dataclass(eq=False, slots=True)
class Credentials:
    """The client's token, and its renewal on the current connection."""

    _token: Token | None  # or its source; None for a server that accepts anonymous clients
    _on_refused: Callable[[ServerError], None]  # called when the server refuses a token
    principal: str | None = None  # the principal of the client; None if the server has not told
    _renewal: asyncio.Task[None] | None = None

    @property
    def can_replace(self) -> bool:
        """Whether a token was accepted and the source can return another one."""
        return callable(self._token) and self.principal is not None

    async def fresh_token(self) -> str | None:
        """Return a token for a new connection.

        Raises:
            AttemptFailed: the source raised an exception.
        """
        if self._token is None or isinstance(self._token, str):
            return self._token
        try:
            return await self._token()
        except Exception as error:
            raise AttemptFailed(f"no token: {str(error) or type(error).__name__}") from error

    def send(self, token: str, link: Link) -> None:
        """Send an ``auth`` frame, and renew the token while the connection lasts."""

        def on_answer(answer: Mapping[str, Any]) -> None:
            if is_refusal(answer):  # the token before this one stays valid
                error = ServerError.of(answer)
                self._on_refused(error)
                if error.retryable:
                    self._schedule(SHORTEST_RENEWAL, link)
                return
            self.principal = answer["principal"]
            if (life := remaining_life(answer)) is not None:
                self._schedule(life * RENEW_AT, link)

        link.send(Request(lambda: Auth(token=token), on_answer))

    def stop(self) -> None:
        """Stop the renewal, since the connection has ended."""
        if self._renewal is not None:
            self._renewal.cancel()

    def _schedule(self, seconds: float, link: Link) -> None:
        self.stop()
        if callable(self._token):
            renewal = self._renew(max(SHORTEST_RENEWAL, seconds), link)
            self._renewal = asyncio.get_running_loop().create_task(renewal)

    async def _renew(self, seconds: float, link: Link) -> None:
        """Send a fresh token after some seconds. Ask a source that fails again until it succeeds.

        If the old token expires first, the server closes, and the next connection has a fresh one.
        """
        while True:
            await sleep(seconds)
            with contextlib.suppress(AttemptFailed):
                token = await self.fresh_token()
                assert token is not None
                self.send(token, link)
                return
            seconds = SHORTEST_RENEWAL


def remaining_life(answer: Mapping[str, Any]) -> float | None:
    """Return the seconds until a token expires; None if it does not, or if that is unknown.

    Args:
        answer: an ``authenticated`` frame. A server without ``expires_in`` sends only the time
            ``expires``, which the client's own clock may put in the past.
    """
    seconds, expires = answer.get("expires_in"), answer.get("expires")
    if seconds is None and expires is not None and (left := expires - time.time()) > 0:
        seconds = left
    return parse_seconds(seconds)
