"""HTTP requests and the answers to them, whatever carries them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus

__all__ = ["TEXT", "Answer", "Request", "Response", "Upgrade", "method_not_allowed", "respond"]

TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """The head of an HTTP request.

    Attributes:
        method: in upper case.
        target: the path with its query.
        headers: by their names in lower case. The values of a repeated header are joined with
            commas (RFC 9110 section 5.3).
        version: of HTTP, such as ``1.1``.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    version: str = "1.1"

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


@dataclass(frozen=True, slots=True)
class Response:
    """A whole HTTP response."""

    status: HTTPStatus
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def to(self, request: Request) -> "Response":
        """Return the response without its body where the method is HEAD (RFC 9110 9.3.2)."""
        return replace(self, body=b"") if request.method == "HEAD" else self

    def encode(self) -> bytes:
        """Return the response as the bytes of HTTP/1.1."""
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The request may open a WebSocket (RFC 6455).

    ``subprotocols`` are those that the server speaks. A client that offers none of them is served
    all the same.
    """

    subprotocols: Sequence[str]


Answer = Response | Upgrade


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
    return Response(status, {**common, **(headers or {})}, body)


def method_not_allowed() -> Response:
    """Answer a method that no address of the server has."""
    status = HTTPStatus.METHOD_NOT_ALLOWED
    return respond(status, "Method not allowed", headers={"Allow": "GET, HEAD"})
