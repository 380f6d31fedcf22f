"""HTTP responses."""

from collections.abc import Mapping
from http import HTTPStatus

from websockets.datastructures import Headers
from websockets.http11 import Response

__all__ = ["TEXT", "method_not_allowed", "respond"]

TEXT = "text/plain; charset=utf-8"


def respond(
    status: HTTPStatus,
    body: str | bytes,
    content_type: str = TEXT,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Make a response; a body of ``str`` is one line for people."""
    if isinstance(body, str):
        body = f"{body}\n".encode()
    common = {
        "Connection": "close",
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(status.value, status.phrase, Headers({**common, **(headers or {})}), body)


def method_not_allowed() -> Response:
    """Answer a method that no address here knows."""
    status = HTTPStatus.METHOD_NOT_ALLOWED
    return respond(status, "Method not allowed", headers={"Allow": "GET, HEAD"})
