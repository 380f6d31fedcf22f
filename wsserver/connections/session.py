"""The state of one connection that its parts share, and the sending of frames and errors."""

import secrets
from dataclasses import dataclass
from typing import Protocol

from wsserver.admission import Visitor
from wsserver.connections.cursor import Sink
from wsserver.encoding import encode
from wsserver.errors import Code, Refused, StoreError
from wsserver.hub.hub import Hub
from wsserver.limits import Account
from wsserver.logs import log
from wsserver.protocol import ClientFrame, Close, Error, ServerFrame
from wsserver.settings import Settings
from wsserver.telemetry import Metrics


class Transport(Sink, Protocol):
    """Sends data to one client."""

    def end(self, code: Close, reason: str) -> None:
        """Close the connection after sending all data that was written before."""
        ...


@dataclass(eq=False, slots=True)
class Session:
    """The state that all parts of a connection share."""

    transport: Transport
    hub: Hub
    settings: Settings
    visitor: Visitor  # has the principal of the client, once the client has authenticated
    ended: bool = False  # further frames are ignored: the connection is closing or closed

    @property
    def owner(self) -> str:
        """The name of the principal.

        Raises:
            Refused: the client has not authenticated.
        """
        if self.visitor.principal is None:
            raise Refused(
                Code.UNAUTHENTICATED, 'Say first who you are: {"type": "auth", "token": "…"}.'
            )
        return self.visitor.principal.name

    def check_authenticated(self) -> None:
        """Check that the client has authenticated.

        Raises:
            Refused: the client has not authenticated.
        """
        _ = self.owner

    @property
    def account(self) -> Account:
        """The account whose limits apply."""
        return self.visitor.account

    def end(self, code: Close, reason: str) -> None:
        """Ignore further frames, and close the connection."""
        self.ended = True
        self.transport.end(code, reason)

    def write(self, frame: ServerFrame) -> None:
        """Send a frame."""
        self.transport.write(encode(frame))

    def fail(self, error: Exception, frame: ClientFrame | None) -> Refused:
        """Send the error for a frame whose answer failed, and return the error."""
        refused, cause = refusal_of(error)
        if frame is not None:
            name_frame(refused, frame)
        self.refuse(refused, frame, cause)
        return refused

    def refuse(
        self, refused: Refused, frame: ClientFrame | None, cause: Exception | None = None
    ) -> None:
        """Send an error.

        Args:
            refused: the error.
            frame: the refused frame; None for an unusable one.
            cause: the exception behind the error. It is logged, and not sent.
        """
        kind = "none" if frame is None else frame.type
        self.write(error_frame(self.hub.metrics, kind, refused, cause))


def refusal_of(error: Exception) -> tuple[Refused, Exception | None]:
    """Return what the client is told of an error, and the error if it is a failure to be logged."""
    if isinstance(error, Refused):
        return error, None
    return Refused(Code.STORE if isinstance(error, StoreError) else Code.INTERNAL), error


def error_frame(metrics: Metrics, kind: str, refused: Refused, cause: Exception | None) -> Error:
    """Count and log a refusal, and make its frame.

    Args:
        metrics: the numbers to count in.
        kind: the type of the frame that is refused; ``none`` for an unusable one.
        refused: what the client is told.
        cause: what has failed; it is logged, and the client does not see it.
    """
    ref = secrets.token_hex(4)
    metrics.frame_refused(kind, refused.code)
    if cause is None:
        log.debug("frame refused", ref=ref, code=refused.code)
    else:
        reason = str(cause) if isinstance(cause, StoreError) else None
        log.error("frame failed", ref=ref, code=refused.code, reason=reason, failure=cause)
    return Error(
        code=refused.code,
        message=refused.message,
        about=refused.about,
        request=refused.request,
        retryable=refused.retryable,
        retry_after=refused.retry_after,
        ref=ref,
    )


def name_frame(refused: Refused, frame: ClientFrame) -> None:
    """Set ``about`` and ``request`` of a refusal."""
    about = getattr(frame, "id", None) or getattr(frame, "conversation", None)
    refused.about = refused.about or about
    refused.request = refused.request or frame.request
