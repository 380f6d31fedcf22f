"""The errors of Chat Completions, as OpenAI and the servers that imitate its API write them.

https://platform.openai.com/docs/guides/error-codes
"""

import re
from collections.abc import Mapping
from typing import Any

from wsserver.errors import Code, ModelError
from wsserver.models.failures import (
    BY_STATUS,
    ApiError,
    TransientError,
    get,
    is_no_path,
    mid_stream,
)

# Names of errors, in `error.code` or `error.type`. The status has a name for the others.
_BY_NAME = {
    "billing_hard_limit_reached": Code.SPEND_LIMIT,
    "budget_exceeded": Code.SPEND_LIMIT,  # LiteLLM
    "content_filter": Code.REFUSAL,
    "content_policy_violation": Code.REFUSAL,
    "context_length_exceeded": Code.PROMPT_TOO_LONG,
    "exceed_context_size_error": Code.PROMPT_TOO_LONG,  # llama.cpp
    "insufficient_quota": Code.SPEND_LIMIT,
    "invalid_api_key": Code.CREDENTIALS,
    "model_not_found": Code.MODEL_NOT_FOUND,
    "overloaded_error": Code.OVERLOADED,
    "rate_limit_exceeded": Code.RATE_LIMITED,
    "string_above_max_length": Code.PROMPT_TOO_LONG,
}
# Messages about a prompt that is too long. llama.cpp may send them with the status 500.
_TOO_LONG = re.compile(
    r"maximum context length|context (length|size|window)|(prompt|input) is too long",
    re.IGNORECASE,
)
# Messages about a model that the server does not have, with the status 400: OpenRouter, LiteLLM, LM
# Studio.
_NO_MODEL = re.compile(
    r"not a valid model|invalid model name|no models loaded|model\b.{1,100} (not found|not exist)",
    re.IGNORECASE,
)
_CONTEXT = re.compile(r"maximum context length is (\d{1,9})\b", re.IGNORECASE)
_INPUT = re.compile(
    r"(?<!\d)(\d{1,9}) (?:in the messages|input tokens|of text input)", re.IGNORECASE
)

_ADVICE = (
    "the server has no such path; correct OPENAI_BASE_URL: the URLs of most servers end in /v1"
)


class ChatError(ApiError):
    """An error of Chat Completions.

    Args:
        status: the status of the response.
        headers: the headers of the response, with names in lower case.
        body: the parsed body; None if it is not JSON.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: object) -> None:
        cause = _cause(body)
        name = get(cause, "code")
        super().__init__(
            status,
            headers,
            kind=name if isinstance(name, str) else get(cause, "type"),
            message=get(cause, "message"),
            request_id=headers.get("x-request-id"),
        )
        if self.has_no_path:
            self.advice = _ADVICE
        self.parameter = get(cause, "param")  # the key of the body that is refused
        self._named = _named(cause)

    def code(self) -> Code:
        """Return the code of the error."""
        return self._named or super().code()

    def fitting(self, max_tokens: int) -> int | None:
        """Return fewer output tokens that fit beside the input, if the message has the numbers.

        Some servers refuse a request whose input and ``max_tokens`` together exceed the context.
        """
        context, given = _CONTEXT.search(self.message), _INPUT.search(self.message)
        if context is None or given is None:
            return None
        left = int(context[1]) - int(given[1])
        return left if 0 < left < max_tokens else None


def of_event(error: object) -> ModelError | TransientError:
    """Return the exception to raise for an error in a stream."""
    cause = _cause({"error": error})
    code, name = _named(cause), get(cause, "code")
    if isinstance(name, str) and re.fullmatch(r"[0-9]{3}", name):  # LiteLLM
        name = int(name)
    if code is None and isinstance(name, int):
        code = BY_STATUS.get(name)  # the status of the response is 200
    kind, message = name if isinstance(name, str) else get(cause, "type"), get(cause, "message")
    if code is None and isinstance(message, str) and is_no_path(message):  # LM Studio
        return mid_stream(Code.MODEL_NOT_FOUND, kind, message, advice=_ADVICE)
    return mid_stream(code or Code.UPSTREAM_ERROR, kind, message)


def _cause(body: object) -> dict[str, Any]:
    """Return the error of a body: an object under ``error``, a text there, or the whole body."""
    if isinstance(body, list):  # Gemini
        body = body[0] if body else None
    error = get(body, "error")
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, dict):
        return error
    return body if isinstance(body, dict) else {}


def _named(cause: Mapping[str, Any]) -> Code | None:
    for key in ("code", "type"):
        name = cause.get(key)
        if isinstance(name, str) and (code := _BY_NAME.get(name)) is not None:
            return code
    if isinstance(get(cause.get("metadata"), "reasons"), list):  # OpenRouter, with the status 403
        return Code.REFUSAL
    message = cause.get("message")
    if not isinstance(message, str):
        return None
    if _TOO_LONG.search(message):
        return Code.PROMPT_TOO_LONG
    return Code.MODEL_NOT_FOUND if _NO_MODEL.search(message) else None
