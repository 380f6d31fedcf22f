"""A deployment, and what the checks have learned of it so far."""

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from wsserver.addresses import is_local
from wsserver.doctor import advice
from wsserver.doctor.line import BODY_KEPT, OPEN_TIMEOUT, Line, Response, Target, dial


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the checks of replies and of the idle time take, in seconds.

    Attributes:
        patience: until the first piece of a reply.
        listening: from the first piece on.
        idle: without a frame.
        whole: for all checks.
    """

    patience: float
    listening: float
    idle: float
    whole: float


THOROUGH = Pace(patience=60.0, listening=2.0, idle=65.0, whole=float("inf"))
QUICK = Pace(patience=5.0, listening=1.0, idle=0.0, whole=9.0)


@dataclass
class Deployment:
    """A deployment under check.

    Attributes:
        target: its addresses.
        token: bearer token of the user; None without one.
        pace: how long the checks may take.
        proxy: key of the proxy in :mod:`wsserver.doctor.advice`; None for an unknown one.
        upgrades: whether WebSocket handshakes reach the server.
        chats: whether chats over HTTP reach the server.
        admits: how the server admits the user: with the token in the ``Authorization`` header or
            in an ``auth`` frame, without a token, or not at all.
    """

    target: Target
    token: str | None
    pace: Pace
    proxy: str | None = None
    upgrades: bool = False
    chats: bool = False
    admits: str | None = None  # "header", "frame", "anyone"
    context: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if self.target.secure:
            self.context = ssl.create_default_context()
            # As browsers do for WebSocket: a server that knows HTTP/2 only refuses this.
            self.context.set_alpn_protocols(["http/1.1"])

    @property
    def bearer(self) -> dict[str, str]:
        """The `Authorization` header with the user's token; empty without one."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def credentials(self) -> dict[str, str]:
        """The same, if the server accepts it."""
        return self.bearer if self.admits == "header" else {}

    def advise(self, trouble: advice.Advice) -> tuple[str, ...]:
        """Return the lines of advice for the proxy of this deployment."""
        return advice.advise(trouble, self.proxy)

    def notice(self, response: Response) -> None:
        """Learn from a response which proxy there is."""
        self.proxy = self.proxy or advice.recognize(response.headers, response.body)

    @asynccontextmanager
    async def dial(
        self,
        headers: Mapping[str, str] | None = None,
        *,
        origin: str | None = None,
        host: str | None = None,
    ) -> AsyncIterator[Line]:
        """Open a WebSocket; see :func:`wsserver.doctor.line.dial`."""
        async with dial(
            self.target, self.context, headers=headers or {}, origin=origin, host=host
        ) as line:
            yield line

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        """Open a WebSocket as the user, ready for prompts if the server admits the user."""
        # A page connects without a token, and authenticates by a frame.
        origin = self.target.origin if self.admits in {"frame", None} else None
        async with self.dial(self.credentials, origin=origin) as line:
            if self.admits == "frame":
                await line.send({"type": "auth", "token": self.token})
                await line.next("authenticated")
            yield line

    def client(self) -> httpx2.AsyncClient:
        """Return a client for the HTTP routes, as the user."""
        return httpx2.AsyncClient(
            base_url=self.target.http,
            headers=self.bearer,
            verify=self.context or True,
            timeout=OPEN_TIMEOUT,
            trust_env=not is_local(self.target.host),
        )


async def fetch(client: httpx2.AsyncClient, method: str, path: str, **given: Any) -> Response:
    """Send a request, and return the response with the begin of its body."""
    async with client.stream(method, path, **given) as response:
        return await read(response)


async def read(response: httpx2.Response) -> Response:
    """Return a response with the begin of its body, which may have no end."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) >= BODY_KEPT:
            break
    found = body[:BODY_KEPT].decode(errors="replace")
    return Response(response.status_code, dict(response.headers), found)
