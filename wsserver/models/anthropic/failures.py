"""The errors of the Messages API.

https://platform.claude.com/docs/en/api/errors
"""

import re
from collections.abc import Mapping
from typing import Any

from wsserver.errors import Code, ModelError
from wsserver.models.failures import ApiError, TransientError, get, mid_stream

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

# Messages of the API about a prompt that is too long, alone or together with `max_tokens`.
_TOO_LONG = re.compile(r"(prompt|input) is too long|exceeds? (the )?context", re.IGNORECASE)

_ADVICE = (
    "the server has no such path; correct ANTHROPIC_BASE_URL: the URLs of most servers have no /v1 "
    "at their end"
)


class MessagesError(ApiError):
    """An error of the Messages API.

    Args:
        status: the status of the response.
        headers: the headers of the response, with names in lower case.
        body: the parsed body; None if it is not JSON.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: object) -> None:
        cause = get(body, "error")
        super().__init__(
            status,
            headers,
            kind=get(cause, "type"),
            message=get(cause, "message"),
            request_id=headers.get("request-id"),
        )
        if self.has_no_path:
            self.advice = _ADVICE
        self._spend_limit = self.kind == "billing_error" or _has_reached_limit(cause)

    def code(self) -> Code:
        """Return the code of the error."""
        if self._spend_limit:
            return Code.SPEND_LIMIT
        return Code.PROMPT_TOO_LONG if _TOO_LONG.search(self.message) else super().code()


def of_event(event: dict[str, Any]) -> ModelError | TransientError:
    """Return the exception to raise for an ``error`` event."""
    error = event["error"]
    code = _BY_TYPE.get(error["type"], Code.UPSTREAM_ERROR)
    if code is Code.BAD_REQUEST and _TOO_LONG.search(str(error.get("message"))):
        code = Code.PROMPT_TOO_LONG
    if _has_reached_limit(error):
        code = Code.SPEND_LIMIT
    return mid_stream(code, error["type"], error.get("message"), event.get("request_id"))


def _has_reached_limit(error: object) -> bool:
    code = get(get(error, "details"), "error_code")
    return str(code).endswith("spend_limit_reached")
