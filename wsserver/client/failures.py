"""What a client meets.

::

    ChatError
     ├── ConnectionFailed   there is no connection, and it is not tried any more
     └── ServerError        the server refused a request
          └── ReplyError    it refused a prompt, or the reply failed
"""

import math
from collections.abc import Mapping
from typing import Any, Self

from wsserver.errors import WsserverError

__all__ = ["ChatError", "ConnectionFailed", "ReplyError", "ServerError", "seconds_of"]


class ChatError(WsserverError):
    """The root of what the client raises."""


class ConnectionFailed(ChatError):
    """There is no connection, and it is not tried any more.

    Attributes:
        status: that the server answered the handshake with, if it was that.
        close_code: that it closed the connection with, if it was that.
        final: whether the same would happen again. If not, the chat tries again when it is asked
            for something.
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
    """The server refused a request, and nothing has changed.

    Attributes:
        code: as ``PROTOCOL.md`` lists them.
        message: for people.
        retryable: whether the same can succeed later, unchanged.
        retry_after: in how many seconds, where known.
        ref: what finds the line in the server's log.
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
        """Make one of an ``error`` frame."""
        return cls(
            str(frame["code"]),
            str(frame.get("message", "")),
            retryable=bool(frame.get("retryable")),
            retry_after=seconds_of(frame.get("retry_after")),
            ref=str(frame.get("ref", "")),
        )

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class ReplyError(ServerError):
    """A prompt was refused, or its reply failed. What was said before is in the reply's text.

    After ``interrupted``, the server died, and the conversation may have less than that text:
    :meth:`Chat.history` tells what was saved.
    """


def seconds_of(value: object) -> float | None:
    """Check a time to wait of a frame's, which nobody could wait for if it were no number."""
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a time to wait is a number")
    return max(0.0, value)
