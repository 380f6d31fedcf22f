"""Refusals of connections, as HTTP responses."""

from collections.abc import Mapping
from http import HTTPStatus

from wsserver.telemetry import Refusal

RETRY_AFTER = 10  # seconds until a client over a limit may connect again


class Denied(Exception):
    """The server refuses a connection."""

    def __init__(
        self,
        status: HTTPStatus,
        why: Refusal,
        message: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status  # status of the HTTP response
        self.why = why  # reason in the log and the metrics
        self.message = message  # text for people: what the client or the operator can do
        self.headers = headers or {}  # headers of the HTTP response


def unauthenticated() -> Denied:
    """Return the refusal of a client whose token is missing or not valid."""
    return Denied(
        HTTPStatus.UNAUTHORIZED,
        "unauthenticated",
        "Send a valid token, as `Authorization: Bearer TOKEN`.",
        {"WWW-Authenticate": "Bearer"},
    )


def unavailable(why: Refusal, message: str) -> Denied:
    """Return a temporary refusal: 503 with Retry-After."""
    headers = {"Retry-After": str(RETRY_AFTER)}
    return Denied(HTTPStatus.SERVICE_UNAVAILABLE, why, message, headers)


def no_place() -> Denied:
    """Return the refusal of a connection over the limit of the server."""
    return unavailable("limit", "This server has its maximum number of connections.")


def no_memory() -> Denied:
    """Return the refusal of a request for which there is no memory."""
    return unavailable("limit", "This server has no memory left for this request.")


def too_many(whose: str) -> Denied:
    """Return the refusal of a connection over the limit of an address or principal."""
    return Denied(
        HTTPStatus.TOO_MANY_REQUESTS,
        "limit",
        f"This {whose} has its maximum number of connections.",
        {"Retry-After": str(RETRY_AFTER)},
    )
