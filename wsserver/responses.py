"""HTTP requests and the answers to them, whatever carries them."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Protocol
from uuid import UUID

TEXT = "text/plain; charset=utf-8"
BODY_RATE = 16_384  # bytes of a body in each second, on average: a slow mobile uplink has more


async def _no_body(_: int) -> bytes:
    return b""


def _no_limit(_: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Request:
    """The head of an HTTP request, and a function that reads its body."""

    method: str  # in upper case
    target: str  # the path with its query
    # By their names in lower case. The values of a repeated header are joined with commas (RFC 9110
    # section 5.3).
    headers: Mapping[str, str]
    version: str = "1.1"  # of HTTP, such as `1.1`
    # Reads the body, of at most so many bytes, and returns it. Raises `BadRequest` for a
    # body that is larger, slow or malformed.
    read_body: Callable[[int], Awaitable[bytes]] = field(default=_no_body, compare=False)
    # Gives the application the `open_timeout` and so many seconds for its answer, from now on.
    extend: Callable[[float], None] = field(default=_no_limit, compare=False)

    @property
    def query(self) -> str:
        """The query of the target, without its question mark."""
        return self.target.partition("?")[2]

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

    def encode(self, *, keep: bool = False) -> bytes:
        """Return the response as the bytes of HTTP/1.1.

        Args:
            keep: tell the client that the connection serves another request.
        """
        return _head(self.status, self.headers, keep=keep) + self.body


class BadRequest(Exception):
    """The request cannot be answered as asked; ``response`` says why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.response = respond(status, message)


class BodyWriter(Protocol):
    """Writes the body of a response while the response is made."""

    @property
    def id(self) -> UUID:
        """The name of the connection in the log."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        ...

    def write(self, data: bytes) -> None:
        """Write a part of the body without waiting."""
        ...

    def end(self) -> None:
        """End the body after all earlier writes."""
        ...

    def abort(self) -> None:
        """Abort the connection, so that the client does not take the body for whole."""
        ...


class Producer(Protocol):
    """Makes the body of one response. The last call is that of ``closed``."""

    def open(self, body: BodyWriter) -> None:
        """Begin to write: the client gets the head now. Never called for a client that has gone."""
        ...

    def wake(self) -> None:
        """Go on writing: the client has caught up."""
        ...

    def closed(self) -> None:
        """Write no more: the body has ended, or the client has gone, perhaps before ``open``."""
        ...


@dataclass(frozen=True, slots=True)
class Stream:
    """A response whose body is written while it is made."""

    status: HTTPStatus
    headers: Mapping[str, str]
    producer: Producer

    def to(self, request: Request) -> "Stream | Response":
        """Return the head alone where the method is HEAD (RFC 9110 9.3.2)."""
        if request.method != "HEAD":
            return self
        self.producer.closed()
        return Response(self.status, self.headers)

    def encode(self, *, chunked: bool, keep: bool = False) -> bytes:
        """Return the head of the response as the bytes of HTTP/1.1.

        Args:
            chunked: whether the body comes in chunks (RFC 9112 section 7.1); else the end of the
                connection is its end.
            keep: tell the client that the connection serves another request.
        """
        coding = {"Transfer-Encoding": "chunked"} if chunked else {}
        return _head(self.status, {**self.headers, **coding}, keep=keep)


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The request may open a WebSocket (RFC 6455).

    ``subprotocols`` names the subprotocols of the server. A client that offers none of them is
    served as well.
    """

    subprotocols: Sequence[str]


Answer = Response | Upgrade | Stream


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


def too_large(limit: int) -> BadRequest:
    """Refuse a body of more bytes than the limit."""
    message = f"The body of the request has more than {limit} bytes."
    return BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


def too_slow() -> BadRequest:
    """Refuse a body that did not come in time."""
    return BadRequest(HTTPStatus.REQUEST_TIMEOUT, "The body of the request came too slowly.")


def _head(status: HTTPStatus, headers: Mapping[str, str], *, keep: bool) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Connection: {'keep-alive' if keep else 'close'}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
