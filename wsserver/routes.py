"""What plain HTTP gets: the page, and what operators and their machines look at."""

import asyncio
import hashlib
import hmac
import importlib.resources
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import ClassVar

from websockets.http11 import Response

from wsserver.admission import bearer
from wsserver.responses import respond
from wsserver.telemetry import Metrics

__all__ = ["Operations", "Page"]


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
        return respond(
            HTTPStatus.NOT_MODIFIED if fresh else HTTPStatus.OK,
            b"" if fresh else body,
            f"{kind}; charset=utf-8",
            {
                "Content-Security-Policy": self.POLICY,
                "ETag": tag,
                "Referrer-Policy": "no-referrer",
            },
        )


class Operations:
    """``/healthz``: it is alive. ``/readyz``: send it clients. ``/metrics``: for Prometheus.

    Args:
        metrics: what has been counted.
        ready: tells what it takes to serve clients, part by part, and whether it is there.
        token: lets programs read the metrics; "" lets those that are trusted.

    Attributes:
        token: the same; it may be replaced.
    """

    PATHS = ("/healthz", "/readyz", "/metrics")

    def __init__(
        self,
        metrics: Metrics,
        ready: Callable[[], Awaitable[Mapping[str, bool]]],
        token: str,
    ) -> None:
        self._metrics = metrics
        self._ready = ready
        self.token = token
        self._looking: asyncio.Task[Mapping[str, bool]] | None = None

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
