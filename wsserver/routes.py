"""Answers HTTP requests: the page, the handshake of a WebSocket, and the paths for operators."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar

from wsserver.admission import Admission, Visitor, bearer
from wsserver.chats.chats import Chats
from wsserver.denials import Denied
from wsserver.page import Page
from wsserver.protocol import SUBPROTOCOL
from wsserver.responses import (
    Answer,
    Request,
    Response,
    Upgrade,
    method_not_allowed,
    respond,
)
from wsserver.settings import Settings
from wsserver.telemetry import Metrics

WEBSOCKET_PATHS = ("/", "/ws")
PROBES = ("/healthz", "/readyz")  # load balancers request these by any host name


@dataclass(eq=False)
class Operations:
    """The paths for operators.

    ``/healthz``: the process lives. ``/readyz``: the server can serve clients. ``/metrics``: the
    metrics in the format of Prometheus.
    """

    PATHS: ClassVar = ("/healthz", "/readyz", "/metrics")

    _metrics: Metrics
    # Returns the parts that clients need, and whether each of them works.
    _ready: Callable[[], Awaitable[Mapping[str, bool]]]
    token: str  # needed for the metrics; "" without one: then trusted clients get them
    _checking: asyncio.Task[Mapping[str, bool]] | None = None

    async def respond(self, path: str, headers: Mapping[str, str], *, trusted: bool) -> Response:
        """Answer one of :attr:`PATHS`.

        Args:
            path: the path.
            headers: headers of the request, names in lower case.
            trusted: the client gets the metrics without a token, if there is no token for them.
        """
        if path == "/healthz":
            return respond(HTTPStatus.OK, "ok")
        if path == "/readyz":
            return await self._readiness()
        given = bearer(headers) or ""
        known = bool(self.token) and hmac.compare_digest(given.encode(), self.token.encode())
        if not (known or (trusted and not self.token)):
            return respond(
                HTTPStatus.UNAUTHORIZED,
                "Metrics are for the token of the setting `metrics_token` "
                "(WSSERVER_METRICS_TOKEN), or at the operations_port.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return respond(HTTPStatus.OK, self._metrics.exposition(), self._metrics.content_type)

    async def _readiness(self) -> Response:
        # All requests at the same time share one check.
        if self._checking is None:
            self._checking = asyncio.ensure_future(self._ready())
            self._checking.add_done_callback(self._checked)
        parts = await asyncio.shield(self._checking)
        ready = all(parts.values())
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return respond(status, json.dumps({"ready": ready, **parts}), "application/json")

    def _checked(self, _: "asyncio.Task[Mapping[str, bool]]") -> None:
        self._checking = None


class Routes:
    """Checks whether the client may make a request, and passes the request to its route.

    Args:
        settings: whether operators have a port of their own, and whether clients need a token.
        admission: the rules for hosts, origins, addresses and tokens.
        operations: the part for operators.
        chats: the part for chats over plain HTTP.
    """

    def __init__(
        self, settings: Settings, admission: Admission, operations: Operations, chats: Chats
    ) -> None:
        self._chats = chats
        self._admission = admission
        self._operations = operations
        self._page = Page()
        # Programs of this machine get the metrics if only this machine can reach the server.
        self._private = admission.authenticate is None and not settings.allow_anonymous
        apart = settings.operations_port is not None
        self._operations_paths = ("/healthz",) if apart else operations.PATHS

    async def respond(self, request: Request, visitor: Visitor) -> Answer:
        """Answer a request of a client.

        Raises:
            Denied: the client may not make this request.
        """
        headers, path = request.headers, request.path
        visitor.introduce(headers)
        if path not in PROBES:
            visitor.check_room()
            self._admission.names.check_host(headers)
        websocket = "websocket" in headers.get("upgrade", "").lower()
        if websocket and path in WEBSOCKET_PATHS and request.method == "GET":
            await visitor.check_admission(request.target, headers)
            return Upgrade((SUBPROTOCOL,))
        if self._chats.answers(path):
            return await self._chats.respond(request, visitor)
        if path in self._page:  # a page cannot show why its WebSocket was refused
            visitor.check_private(headers)
        return await self._get(request, visitor)

    async def _get(self, request: Request, visitor: Visitor) -> Response:
        path, headers = request.path, request.headers
        if path not in {*WEBSOCKET_PATHS, *self._operations_paths} and path not in self._page:
            return respond(HTTPStatus.NOT_FOUND, "Not found")
        if request.method not in {"GET", "HEAD"}:
            return method_not_allowed()
        if path in self._page:
            return self._page.respond(path, headers)
        if path in self._operations_paths:
            trusted = self._private and visitor.local(headers)
            return await self._operations.respond(path, headers, trusted=trusted)
        return respond(
            HTTPStatus.UPGRADE_REQUIRED,
            "This address speaks WebSocket; the page is at /",
            headers={"Upgrade": "websocket"},
        )

    def deny(self, denied: Denied, request: Request) -> Response:
        """Answer a client that may not have what it requests."""
        if self._chats.answers(request.path):
            return self._chats.deny(denied, request.headers)
        return respond(denied.status, denied.message, headers=denied.headers)

    async def respond_to_operator(self, request: Request, *, check_host: bool) -> Response:
        """Answer a request at the port for operators.

        Args:
            request: the request.
            check_host: refuse the metrics to hosts that are not this server's.

        Raises:
            Denied: the host is not this server's.
        """
        path, headers = request.path, request.headers
        if path == "/metrics" and check_host:
            self._admission.names.check_host(headers)
        if path not in self._operations.PATHS:
            return respond(HTTPStatus.NOT_FOUND, "Not found")
        if request.method not in {"GET", "HEAD"}:
            return method_not_allowed()
        return await self._operations.respond(path, headers, trusted=True)
