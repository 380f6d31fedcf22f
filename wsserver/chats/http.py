"""Chats in the terms of HTTP: bodies, resumed places, statuses and headers."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from wsserver.errors import Code, Refused
from wsserver.parsing import decode, parse_object
from wsserver.protocol import Prompt
from wsserver.responses import BadRequest, Request
from wsserver.telemetry import Refusal

JSON = "application/json"
EVENTS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx passes each event on at once
    "X-Content-Type-Options": "nosniff",
}
NOT_STORED = {"Cache-Control": "no-store"}  # else a cache may keep a 204 (RFC 9110 15.3.5)
STATUS = {
    Code.INVALID_JSON: HTTPStatus.BAD_REQUEST,
    Code.INVALID_FRAME: HTTPStatus.BAD_REQUEST,
    Code.UNKNOWN_TYPE: HTTPStatus.BAD_REQUEST,
    Code.TOO_LONG: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Code.ID_CONFLICT: HTTPStatus.CONFLICT,
    Code.MODEL_NOT_ALLOWED: HTTPStatus.FORBIDDEN,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.FORGOTTEN: HTTPStatus.GONE,
    Code.NOT_LAST: HTTPStatus.CONFLICT,
    Code.GAP: HTTPStatus.CONFLICT,
    Code.NOT_RUNNING: HTTPStatus.CONFLICT,
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Code.BUSY: HTTPStatus.CONFLICT,
    Code.LIMIT: HTTPStatus.TOO_MANY_REQUESTS,
    Code.QUOTA: HTTPStatus.TOO_MANY_REQUESTS,
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The status of each code; 503 for the others."""

CODES: dict[Refusal, Code] = {"limit": Code.LIMIT, "unavailable": Code.AUTH_UNAVAILABLE}
"""The code of each reason to deny a client; ``unauthenticated`` for the others."""

PREFLIGHT = {
    "Access-Control-Allow-Methods": "POST, GET, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "86400",
}

_EVENT_ID = re.compile(r"(?P<id>.+)\.(?P<seq>[0-9]{1,18}|end)")


def cors(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers with which a page of an allowed origin may read the response."""
    if "origin" not in headers:
        return {}
    return {
        "Access-Control-Allow-Origin": headers["origin"],
        "Access-Control-Expose-Headers": "Retry-After",
        "Vary": "Origin",
    }


def decode_body(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        BadRequest: the body is of another type, or compressed.
        Refused: the body is not a JSON object.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise _unsupported(f"Content-Type: must be {JSON}.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _unsupported("Content-Encoding: the body must not be compressed.")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Refused(Code.INVALID_JSON, "The body is not UTF-8.") from None
    return decode(text)


def _unsupported(message: str) -> BadRequest:
    return BadRequest(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message)


def parse_prompt(value: dict[str, Any]) -> Prompt:
    """Parse the keys of a ``prompt`` frame.

    Raises:
        Refused: the object is not a ``prompt`` frame.
    """
    frame = parse_object(value)
    if not isinstance(frame, Prompt):
        raise Refused(Code.UNKNOWN_TYPE, 'type: must be "prompt".')
    return frame


def seq_after(request: Request, name: str) -> int | None:
    """Return the seq after which a client resumes a reply; None if the client has the end.

    Args:
        request: has `Last-Event-ID`, or ``after`` in its query.
        name: the id of the generation.

    Raises:
        Refused: the seq is malformed, or one of another generation.
    """
    (given,) = parse_qs(request.query, keep_blank_values=True).get("after", [""])[-1:]
    event = request.headers.get("last-event-id", "")
    if event:  # the newer place: an EventSource repeats its address
        match = _EVENT_ID.fullmatch(event)
        if match is None or match["id"] != name:
            raise Refused(Code.INVALID_FRAME, "Last-Event-ID: is of another reply.")
        given = match["seq"]
    if given == "end":
        return None
    if not re.fullmatch(r"[0-9]{0,18}", given, re.ASCII):
        raise Refused(Code.INVALID_FRAME, "after: must be a number.")
    return int(given or 0)
