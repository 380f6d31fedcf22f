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

TELL = "Tell the operator of the server, with the reference of this error."


class Code(StrEnum):
    """The ``code`` of an ``error`` frame. The codes are stable: a client may branch on a code.

    ``retryable`` says whether the same prompt can succeed later without a change. ``meaning`` is
    the default message, for people: what happened, and what to do. Only programmers see the
    messages of ``invalid_json``, ``invalid_frame`` and ``unknown_type``.
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
    UNKNOWN_TYPE = "unknown_type", False, "The protocol has no frame of this type."
    TOO_LONG = "too_long", False, "The message is too long for this server. Shorten it."
    ID_CONFLICT = "id_conflict", False, "Another prompt already has this id. Choose another id."
    MODEL_NOT_ALLOWED = (
        "model_not_allowed",
        False,
        "This server does not offer this model. Choose another one.",
    )
    NOT_FOUND = (
        "not_found",
        False,
        "The server does not have this. It may have been deleted, or the address is wrong.",
    )
    FORGOTTEN = (
        "forgotten",
        False,
        "The server has deleted this reply. Send the message again for a new one.",
    )
    NOT_LAST = (
        "not_last",
        False,
        "The conversation has continued, so this reply cannot be replaced. Load it again.",
    )
    GAP = (
        "gap",
        False,
        "The server lost a part of this reply. Load the conversation again to see the rest.",
    )
    NOT_RUNNING = "not_running", False, "The reply has already ended, so there is nothing to stop."
    UNAUTHENTICATED = (
        "unauthenticated",
        False,
        "The token is missing, is not valid, or has expired. Enter a valid token.",
    )
    # The server cannot answer the frame now.
    BUSY = (
        "busy",
        True,
        "Another reply of this conversation is running. Wait for its end, or stop it.",
    )
    LIMIT = "limit", True, "The server is at a limit. Wait a little, and try again."
    QUOTA = "quota", True, "Today's budget is used up. Try again tomorrow."
    AUTH_UNAVAILABLE = (
        "auth_unavailable",
        True,
        "The server cannot check tokens now. Try again in a minute.",
    )
    STORE = (
        "store",
        True,
        "The server cannot read or save conversations now. Try again in a minute.",
    )
    UNAVAILABLE = (
        "unavailable",
        True,
        "Another part of the server does not answer. Try again in a moment.",
    )
    SHUTTING_DOWN = "shutting_down", True, "The server is about to restart. Try again in a moment."
    # Failures of a generation.
    BAD_REQUEST = (
        "bad_request",
        False,
        "The model's provider refused the message. Change it, or begin a new conversation.",
    )
    CREDENTIALS = (
        "credentials",
        False,
        f"The model's provider refused the server's key. {TELL}",
    )
    MODEL_NOT_FOUND = (
        "model_not_found",
        False,
        f"The model's provider has no such model. Choose another one. {TELL}",
    )
    REQUEST_TOO_LARGE = (
        "request_too_large",
        False,
        "The message is too large for the model's provider. Shorten it.",
    )
    RATE_LIMITED = (
        "rate_limited",
        True,
        "The model gets too many messages now. Wait a little, and try again.",
    )
    PROMPT_TOO_LONG = (
        "prompt_too_long",
        False,
        "The message is too long for the model. Shorten it.",
    )
    SPEND_LIMIT = (
        "spend_limit",
        False,
        f"The server's account at the model's provider is at its limit. {TELL}",
    )
    UPSTREAM_ERROR = (
        "upstream_error",
        True,
        "The model's provider has a failure. Try again in a moment.",
    )
    OVERLOADED = "overloaded", True, "The model is overloaded. Wait a little, and try again."
    UNREACHABLE = (
        "unreachable",
        True,
        "The server cannot connect to the model's provider. Try again in a moment.",
    )
    REDIRECTED = (
        "redirected",
        False,
        f"The address of the model's provider has moved. {TELL}",
    )
    UNTRUSTED = (
        "untrusted",
        False,
        f"The certificate of the model's provider is not trusted. {TELL}",
    )
    TIMEOUT = "timeout", True, "The model was silent for too long. Try again."
    INCOMPLETE = "incomplete", True, "The reply broke off before its end. Try again."
    MALFORMED = "malformed", True, "The server could not read the model's reply. Try again."
    INTERRUPTED = "interrupted", True, "The server crashed during the reply. Try again."
    REFUSAL = "refusal", False, "The model declined to answer. Ask in another way."
    INTERNAL = "internal", False, f"The server failed. Try again. {TELL}"


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

WAIT = {Code.UNAVAILABLE: 1.0}
"""Seconds after which to try again, by code, where the server knows no better time."""

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


MALFORMED_ADDRESS = (  # instead of an error of a library, which has parts of the address
    "the address is malformed; write the characters / ? # @ : % of a user and a password as "
    "%2F %3F %23 %40 %3A %25"
)


class StoreInUse(ConfigError):
    """Another server uses the store."""


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
        seconds = WAIT.get(known) if retry_after is None else float(retry_after)
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
        advice: what the operator can do, for the log. It has no text of the API.
        detail: the API's own message. It may quote a prompt, so only level ``debug`` logs it.
    """

    kind: str | None = None
    status: int | None = None
    request_id: str | None = None
    advice: str | None = None
    detail: str | None = None
