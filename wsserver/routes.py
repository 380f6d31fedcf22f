"""What plain HTTP gets: the page, and what operators and their machines look at."""

import asyncio
import base64
import hashlib
import hmac
import importlib.resources
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from websockets.http11 import Response

from wsserver.admission import bearer
from wsserver.responses import respond
from wsserver.telemetry import Metrics

__all__ = ["Client", "Operations", "Page"]

_WEB = importlib.resources.files("wsserver").joinpath("web")


class Page:
    """The page at ``/``, and the policy that lets it run its own scripts and no others."""

    def __init__(self) -> None:
        self._body = _WEB.joinpath("index.html").read_bytes()
        script = _hashes(self._body, b"script")
        style = _hashes(self._body, b"style")
        self._policy = (
            f"default-src 'none'; script-src {script} 'self'; style-src {style}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )

    def respond(self) -> Response:
        """Give the page."""
        return respond(
            HTTPStatus.OK,
            self._body,
            "text/html; charset=utf-8",
            {"Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer"},
        )


class Client:
    """The client in JavaScript at ``/client.js``, which pages import."""

    PATH = "/client.js"

    def __init__(self) -> None:
        self._body = _WEB.joinpath("client.js").read_bytes()
        self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'

    def respond(self, headers: Mapping[str, str]) -> Response:
        """Give it, unless the browser has this one already (RFC 9110 section 13.1.2).

        Args:
            headers: of the request, names in lower case.
        """
        known = re.findall(r'\*|"[^"]*"', headers.get("if-none-match", ""))
        fresh = self._tag in known or "*" in known
        status = HTTPStatus.NOT_MODIFIED if fresh else HTTPStatus.OK
        body = b"" if fresh else self._body
        return respond(status, body, "text/javascript; charset=utf-8", {"ETag": self._tag})


def _hashes(page: bytes, tag: bytes) -> str:
    """Name the inline scripts or styles of a page by their hashes (CSP level 3, section 2.3.1)."""
    found = re.findall(b"<%b[^>]*>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


class Operations:
    """``/healthz``: it is alive. ``/readyz``: send it clients. ``/metrics``: for Prometheus.

    Args:
        metrics: what has been counted.
        ready: tells what it takes to serve clients, part by part, and whether it is there.
        token: lets programs read the metrics; "" lets those that are trusted.
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
        self._token = token
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
        known = bool(self._token) and hmac.compare_digest(given.encode(), self._token.encode())
        if not (known or (trusted and not self._token)):
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
