"""The error codes of the protocol, and the tree of exceptions.

::

    WsserverError
     ├── ConfigError    the configuration is invalid, so the program cannot start
     ├── StoreError     the store could not read or save conversations
     ├── Refused        the server refused a client frame, and changed nothing
     └── ModelError     a model could not finish its reply

Clients see the codes and messages of ``Refused`` and ``ModelError`` only. The text of any other
exception stays in the log.
"""

import math
from enum import StrEnum
from typing import Self


class Code(StrEnum):
    """The ``code`` of an ``error`` frame. The codes are stable: a client may branch on a code.

    ``retryable`` says whether the same prompt can succeed later without a change. ``meaning`` is
    the default message.
    """

    retryable: bool
    meaning: str

    def __new__(cls, value: str, retryable: bool, meaning: str) -> Self:  # noqa: FBT001
        """Create a code from its string value and its two attributes."""
        code = str.__new__(cls, value)
        code._value_ = value
        code.retryable = retryable
        code.meaning = meaning
        return code

    # Errors in a client's frame.
    INVALID_JSON = "invalid_json", False, "The frame is not JSON."
    INVALID_FRAME = "invalid_frame", False, "The frame is JSON, but not a frame of the protocol."
    UNKNOWN_TYPE = "unknown_type", False, "The protocol has no frame of this `type`."
    TOO_LONG = "too_long", False, "The prompt, or the messages together, are over the limit."
    ID_CONFLICT = "id_conflict", False, "Another prompt already has this `id`."
    MODEL_NOT_ALLOWED = "model_not_allowed", False, "The `model` is not on the server's list."
    NOT_FOUND = "not_found", False, "There is no such generation or conversation."
    FORGOTTEN = "forgotten", False, "The generation has ended, and the server has deleted it."
    NOT_LAST = "not_last", False, "The `retry_of` is not the last turn of the conversation."
    GAP = "gap", False, "The generation has fewer pieces than `after`."
    NOT_RUNNING = "not_running", False, "There is nothing to stop. Harmless."
    UNAUTHENTICATED = (
        "unauthenticated",
        False,
        "The token is missing, is not valid, or has expired.",
    )
    # The server cannot answer the frame now.
    BUSY = "busy", True, "Another reply of the conversation runs; see `on_busy`."
    LIMIT = "limit", True, "This client, conversation or server is at a limit."
    QUOTA = "quota", True, "Too few of today's tokens or dollars are left; see `retry_after`."
    AUTH_UNAVAILABLE = "auth_unavailable", True, "The server cannot check tokens now."
    STORE = "store", True, "The server cannot read or save conversations now."
    SHUTTING_DOWN = "shutting_down", True, "The server shuts down; connect again."
    # Failures of a generation.
    BAD_REQUEST = "bad_request", False, "The model's API refused the request."
    CREDENTIALS = "credentials", False, "The model's API refused the server's credentials."
    MODEL_NOT_FOUND = "model_not_found", False, "The model's API has no such model."
    REQUEST_TOO_LARGE = "request_too_large", False, "The request is too large for the model's API."
    RATE_LIMITED = "rate_limited", True, "The model's API limits the rate; see `retry_after`."
    PROMPT_TOO_LONG = "prompt_too_long", False, "The prompt alone is too long for the model."
    SPEND_LIMIT = "spend_limit", False, "The server's account at the model's API is at its limit."
    UPSTREAM_ERROR = "upstream_error", True, "The model's API failed."
    OVERLOADED = "overloaded", True, "The model's API is overloaded."
    UNREACHABLE = "unreachable", True, "The server cannot connect to the model's API."
    REDIRECTED = "redirected", False, "The model's API redirects to another host."
    UNTRUSTED = "untrusted", False, "The certificate of the model's API is not trusted."
    TIMEOUT = "timeout", True, "The model was silent for too long."
    INCOMPLETE = "incomplete", True, "The reply broke off before its end."
    MALFORMED = "malformed", True, "The response of the model's API is malformed."
    INTERRUPTED = "interrupted", True, "The server crashed during the reply."
    REFUSAL = "refusal", False, "The model declined to answer."
    INTERNAL = "internal", False, "The server failed; `ref` finds the error in its log."


UPSTREAM = frozenset(
    {
        Code.CREDENTIALS,
        Code.INCOMPLETE,
        Code.MALFORMED,
        Code.MODEL_NOT_FOUND,
        Code.OVERLOADED,
        Code.RATE_LIMITED,
        Code.REDIRECTED,
        Code.SPEND_LIMIT,
        Code.TIMEOUT,
        Code.UNREACHABLE,
        Code.UNTRUSTED,
        Code.UPSTREAM_ERROR,
    }
)
"""Failures that the model's API caused."""

OUTAGE = UPSTREAM - {Code.MODEL_NOT_FOUND, Code.RATE_LIMITED}
"""Error codes that mean the API is down for every request."""

TOO_LONG = frozenset({Code.PROMPT_TOO_LONG, Code.REQUEST_TOO_LARGE})
"""Failures after which a shorter history may succeed."""

UNBILLED = (
    TOO_LONG | UPSTREAM - {Code.INCOMPLETE, Code.MALFORMED, Code.TIMEOUT} | {Code.BAD_REQUEST}
)
"""Failures of requests that the model's API rejected, and does not bill."""


class WsserverError(Exception):
    """Base class of all exceptions of this package."""


class ConfigError(WsserverError):
    """The configuration is invalid. The message is one line for the operator."""


class StoreError(WsserverError):
    """The store could not read or save conversations. The message is for the log."""


class _Coded(WsserverError):
    def __init__(
        self,
        code: Code | str,
        message: str = "",
        *,
        retryable: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        known = next((known for known in Code if known == code), None)
        if known is None:
            raise ValueError(
                f"{code!r} is not an error code; pass one of wsserver.Code, such as "
                'Code.OVERLOADED or "overloaded", and the message after it'
            )
        super().__init__(message or known.meaning)
        self.code = known
        self.message = str(message or known.meaning)
        self.retryable = known.retryable if retryable is None else bool(retryable)
        seconds = None if retry_after is None else float(retry_after)
        self.retry_after = seconds if seconds is not None and math.isfinite(seconds) else None


class Refused(_Coded):
    """The server refused a client frame, and changed nothing.

    ``about`` is the ``id`` or the ``conversation`` of the frame, and ``request`` is the frame's
    ``request``. Both are None until the server knows them.

    Args:
        code: a member of :class:`Code`, or its string value.
        message: text for people, sent to the client. Default: the code's meaning.
        retryable: whether the same frame can succeed later. Default: the code's ``retryable``.
        retry_after: seconds to wait, or None if unknown. An infinite number counts as unknown.

    Raises:
        ValueError: there is no such code.
    """

    about: str | None = None
    request: str | None = None

    def bare(self) -> Self:
        """Return a copy without traceback and context: these would keep the frame in memory."""
        copy = type(self)(
            self.code, self.message, retryable=self.retryable, retry_after=self.retry_after
        )
        copy.about, copy.request = self.about, self.request
        return copy


class ModelError(_Coded):
    """A model could not finish its reply. The server keeps the text of the reply so far.

    A model of your own raises this error to tell the client what happened. Any other exception
    becomes :attr:`Code.INTERNAL`, and its text stays in the log. The arguments are the same as for
    :class:`Refused`. After :attr:`Code.PROMPT_TOO_LONG` before any text, the server calls the model
    again with fewer turns, until only the prompt is left.

    Attributes:
        kind: the model's own name of the error, for the log. It is a fixed word, and never a text
            that may quote a prompt.
        status: the status code of the API's response, for the log.
        request_id: the API's id of the request, for the log.
    """

    kind: str | None = None
    status: int | None = None
    request_id: str | None = None
