"""Maps failures of the API to error codes, and says whether a new attempt may succeed.

https://platform.claude.com/docs/en/api/errors
"""

import contextlib
import email.utils
import re
import time
from typing import Any

from wsserver.errors import Code, ModelError, WsserverError
from wsserver.models.dial import CannotConnect, ConnectTimeout, ProxyRefused, Untrusted
from wsserver.models.http import Redirected
from wsserver.models.response import ClosedEarly, HttpError, NoResponse

_BY_STATUS = {
    400: Code.BAD_REQUEST,
    401: Code.CREDENTIALS,
    402: Code.SPEND_LIMIT,
    403: Code.CREDENTIALS,
    404: Code.MODEL_NOT_FOUND,
    407: Code.UNREACHABLE,  # of a proxy
    408: Code.TIMEOUT,
    413: Code.REQUEST_TOO_LARGE,
    429: Code.RATE_LIMITED,
    503: Code.OVERLOADED,
    504: Code.TIMEOUT,
    529: Code.OVERLOADED,
}
_BY_TYPE = {  # of an `error` event mid-stream, whose status is 200
    "authentication_error": Code.CREDENTIALS,
    "billing_error": Code.SPEND_LIMIT,
    "invalid_request_error": Code.BAD_REQUEST,
    "not_found_error": Code.MODEL_NOT_FOUND,
    "overloaded_error": Code.OVERLOADED,
    "permission_error": Code.CREDENTIALS,
    "rate_limit_error": Code.RATE_LIMITED,
    "request_too_large": Code.REQUEST_TOO_LARGE,
    "timeout_error": Code.TIMEOUT,
}
_BY_FAILURE: tuple[tuple[type[HttpError], Code], ...] = (  # a class before its bases
    (ConnectTimeout, Code.TIMEOUT),
    (Untrusted, Code.UNTRUSTED),
    (CannotConnect, Code.UNREACHABLE),
    (NoResponse, Code.UNREACHABLE),
    (ClosedEarly, Code.INCOMPLETE),
    (Redirected, Code.REDIRECTED),
)
_PASSING = (Code.TIMEOUT, Code.UNREACHABLE, Code.INCOMPLETE)
_BAD_REQUEST = 400
_SERVER_ERROR = 500

# Messages of the API about a prompt that is too long, alone or together with `max_tokens`.
_TOO_LONG = re.compile(r"(prompt|input) is too long|exceeds? (the )?context", re.IGNORECASE)


class TransientError(WsserverError):
    """An attempt failed, and the next attempt may succeed."""

    def __init__(self, error: ModelError) -> None:
        super().__init__(str(error.code))
        self.error = error


class ApiError(WsserverError):
    """The API answered with an error."""

    def __init__(self, status: int, headers: dict[str, str], body: object) -> None:
        cause = _get(body, "error")
        super().__init__(f"status {status}")
        self.status = status
        # The `type` of the error, if it is a word, as all of the API's are.
        self.kind = _kind(_get(cause, "type"))
        # The API's id of the request, if it has the form of the API's ids.
        self.request_id = _request_id(headers.get("request-id"))
        # The `message` of a 400. It may quote the prompt and is not for the log.
        self.message = str(_get(cause, "message") or "") if status == _BAD_REQUEST else ""
        self._error_code = str(_get(_get(cause, "details"), "error_code") or "")
        self._headers = headers

    def failure(self) -> ModelError | TransientError:
        """Return the exception to raise."""
        code = _BY_STATUS.get(self.status)
        if _TOO_LONG.search(self.message):
            code = Code.PROMPT_TOO_LONG
        if code is None:
            code = Code.UPSTREAM_ERROR if self.status >= _SERVER_ERROR else Code.BAD_REQUEST
        if self.kind == "billing_error" or self._error_code.endswith("spend_limit_reached"):
            code = Code.SPEND_LIMIT
        error = ModelError(code, retry_after=self._retry_after() if code.retryable else None)
        self.identify(error)
        if code.retryable and self._headers.get("x-should-retry") != "false":
            return TransientError(error)
        return error

    def identify(self, error: ModelError) -> None:
        """Copy the API's kind, status and request id to an error, for the log."""
        error.kind, error.status, error.request_id = self.kind, self.status, self.request_id

    def _retry_after(self) -> float | None:
        """Return how long to wait, in seconds (RFC 9110 section 10.2.3; `-ms` is the API's own)."""
        for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
            with contextlib.suppress(ValueError, OverflowError):
                seconds = float(self._headers.get(name, "")) / scale
                if 0 <= seconds < float("inf"):
                    return seconds
        with contextlib.suppress(KeyError, ValueError):
            when = email.utils.parsedate_to_datetime(self._headers["retry-after"])
            return max(0.0, when.timestamp() - time.time())
        return None


def of_http(error: HttpError) -> ModelError | TransientError:
    """Return the exception to raise for an exchange that failed."""
    code = next((code for kind, code in _BY_FAILURE if isinstance(error, kind)), Code.MALFORMED)
    model_error = ModelError(code)
    if isinstance(error, ProxyRefused):
        model_error.kind = "proxy_refused"
    return TransientError(model_error) if code in _PASSING else model_error


def of_event(event: dict[str, Any]) -> ModelError | TransientError:
    """Return the exception to raise for an ``error`` event."""
    error = event["error"]
    code = _BY_TYPE.get(error["type"], Code.UPSTREAM_ERROR)
    if code is Code.BAD_REQUEST and _TOO_LONG.search(str(error.get("message"))):
        code = Code.PROMPT_TOO_LONG
    if str(_get(error.get("details"), "error_code")).endswith("spend_limit_reached"):
        code = Code.SPEND_LIMIT
    model_error = ModelError(code)
    model_error.kind = _kind(error["type"])
    model_error.request_id = _request_id(event.get("request_id"))
    return TransientError(model_error) if code.retryable else model_error


def _get(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _kind(kind: object) -> str | None:
    return kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,64}", kind) else None


def _request_id(name: object) -> str | None:
    return name if isinstance(name, str) and re.fullmatch(r"req_[0-9A-Za-z]{1,64}", name) else None
