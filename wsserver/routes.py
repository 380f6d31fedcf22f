"""Answers to HTTP requests: the page, the opening of a WebSocket, and what operators read."""

import asyncio
import hashlib
import hmac
import importlib.resources
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import ClassVar

from wsserver.admission import Admission, Visitor, bearer
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
PROBES = ("/healthz", "/readyz")  # which load balancers request by any host name


class Page:
    """The page at ``/`` with the files that it loads, and the policy that it has no others.

    The policy also has browsers refuse to read any text as HTML (Trusted Types).
    """

    PATHS: ClassVar[Mapping[str, str]] = {
        "/": "index.html",
        "/page.css": "page.css",
        "/page.js": "page.js",
        "/sidebar.js": "sidebar.js",
        "/turn.js": "turn.js",
        "/format.js": "format.js",
        "/dom.js": "dom.js",
        "/client.js": "client.js",
    }
    POLICY = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    _TYPES: ClassVar[Mapping[str, str]] = {
        "html": "text/html",
        "css": "text/css",
        "js": "text/javascript",
    }

    def __init__(self) -> None:
        folder = importlib.resources.files("wsserver").joinpath("web")
        self._files: dict[str, tuple[bytes, str]] = {}
        for path, name in self.PATHS.items():
            body = folder.joinpath(name).read_bytes()
            self._files[path] = body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    def respond(self, path: str, headers: Mapping[str, str]) -> Response:
        """Give a file, unless the browser has this very one already (RFC 9110 section 13.1.2).

        Args:
            path: one of :attr:`PATHS`.
            headers: of the request, names in lower case.
        """
        body, tag = self._files[path]
        known = re.findall(r'\*|"[^"]*"', headers.get("if-none-match", ""))
        fresh = tag in known or "*" in known
        kind = self._TYPES[self.PATHS[path].rpartition(".")[2]]
        response = respond(
            HTTPStatus.OK,
            body,
            f"{kind}; charset=utf-8",
            {
                "Content-Security-Policy": self.POLICY,
                "ETag": tag,
                "Referrer-Policy": "no-referrer",
            },
        )
        return replace(response, status=HTTPStatus.NOT_MODIFIED, body=b"") if fresh else response


@dataclass(eq=False)
class Operations:
    """``/healthz``: it is alive. ``/readyz``: send it clients. ``/metrics``: for Prometheus."""

    PATHS: ClassVar = ("/healthz", "/readyz", "/metrics")

    _metrics: Metrics
    # Tells what it takes to serve clients, part by part, and whether it is there.
    _ready: Callable[[], Awaitable[Mapping[str, bool]]]
    token: str  # lets programs read the metrics; "" lets those that are trusted
    _looking: asyncio.Task[Mapping[str, bool]] | None = None

    async def respond(self, path: str, headers: Mapping[str, str], *, trusted: bool) -> Response:
        """Answer one of :attr:`PATHS`.

        Args:
            path: which.
            headers: of the request, names in lower case.
            trusted: metrics are for whoever asks, unless there is a token for them.
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
        # One look at a time, however many ask.
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._ready())
            self._looking.add_done_callback(self._looked)
        parts = await asyncio.shield(self._looking)
        ready = all(parts.values())
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return respond(status, json.dumps({"ready": ready, **parts}), "application/json")

    def _looked(self, _: "asyncio.Task[Mapping[str, bool]]") -> None:
        self._looking = None


class Routes:
    """Which part answers a request, and whether admission allows it.

    Args:
        settings: whether operators have a port of their own, and whom the server serves.
        admission: the rules for hosts, origins, addresses and tokens.
        operations: the part for operators.
    """

    def __init__(self, settings: Settings, admission: Admission, operations: Operations) -> None:
        self._admission = admission
        self._operations = operations
        self._page = Page()
        # The metrics are for whoever asks on this machine, where this machine alone is served.
        self._private = admission.authenticate is None and not settings.allow_anonymous
        apart = settings.operations_port is not None
        self._operations_paths = ("/healthz",) if apart else operations.PATHS

    async def respond(self, request: Request, visitor: Visitor) -> Answer:
        """Answer a request of a client.

        Raises:
            Denied: the client may not have what it requests.
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
        if path in Page.PATHS:  # the page could not tell why its WebSocket is refused
            visitor.check_private(headers)
        return await self._get(request, visitor)

    async def _get(self, request: Request, visitor: Visitor) -> Response:
        path, headers = request.path, request.headers
        if path not in {*WEBSOCKET_PATHS, *Page.PATHS, *self._operations_paths}:
            return respond(HTTPStatus.NOT_FOUND, "Not found")
        if request.method not in {"GET", "HEAD"}:
            return method_not_allowed()
        if path in Page.PATHS:
            return self._page.respond(path, headers)
        if path in self._operations_paths:
            trusted = self._private and visitor.local(headers)
            return await self._operations.respond(path, headers, trusted=trusted)
        return respond(
            HTTPStatus.UPGRADE_REQUIRED,
            "This address speaks WebSocket; the page is at /",
            headers={"Upgrade": "websocket"},
        )

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
