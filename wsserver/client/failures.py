"""The exceptions of the client.

::

    ChatError
     ├── ConnectionFailed   there is no connection, and the client has stopped trying
     └── ServerError        the server refused a request
          └── ReplyError    the server refused a prompt, or the reply failed
"""

import math
from collections.abc import Mapping
from typing import Any, Self

from wsserver.errors import WsserverError


class ChatError(WsserverError):
    """The base class of the client's exceptions."""


class ConnectionFailed(ChatError):
    """There is no connection, and the client has stopped trying.

    Attributes:
        status: HTTP status with which the server refused the handshake; None if it did not.
        close_code: close code of the lost connection; None if there was none.
        final: whether another attempt would fail the same way. If false, the chat connects again at
            its next request.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        close_code: int | None = None,
        final: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.close_code = close_code
        self.final = final


class ServerError(ChatError):
    """The server refused a request and changed nothing.

    Attributes:
        code: a code of the table "Errors" in ``PROTOCOL.md``.
        message: text for people.
        retryable: whether the same request can succeed later.
        retry_after: seconds to wait before the next attempt; None if the server does not tell.
        ref: identifies the line in the server's log.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        retry_after: float | None = None,
        ref: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.retry_after = retry_after
        self.ref = ref

    @classmethod
    def of(cls, frame: Mapping[str, Any]) -> Self:
        """Convert an ``error`` frame.

        Raises:
            KeyError, ValueError: the frame violates the protocol.
        """
        return cls(
            str(frame["code"]),
            str(frame.get("message", "")),
            retryable=bool(frame.get("retryable")),
            retry_after=parse_seconds(frame.get("retry_after")),
            ref=str(frame.get("ref", "")),
        )

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class ReplyError(ServerError):
    """The server refused a prompt, or the reply failed. ``Reply.text`` keeps the text so far.

    After the code ``interrupted`` the conversation may have less text than ``Reply.text``, since
    the server died before it saved all of it. :meth:`Chat.history` returns the saved text.
    """


def parse_seconds(value: object) -> float | None:
    """Return a frame's number of seconds, at least 0; None if the frame has none.

    Raises:
        ValueError: the value is not a finite number.
    """
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("retry_after is not a number")
    return max(0.0, value)
