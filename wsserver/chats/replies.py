"""One reply over one HTTP response: a follower whose frames are parts of the body."""

import asyncio
import time
from collections.abc import Callable

from wsserver.admission import Visitor
from wsserver.connections.cursor import Cursor
from wsserver.connections.session import error_frame
from wsserver.dialects import StreamDialect
from wsserver.errors import Code, Refused
from wsserver.hub.hub import Hub
from wsserver.hub.live import Generation
from wsserver.logs import log
from wsserver.responses import BodyWriter
from wsserver.telemetry import StreamEnd


class ReplyStream:
    """Writes a generation as the body of a response.

    It follows the generation from the moment that it is made, so that the grace time does not
    begin before the head is written.

    Args:
        hub: runs the generation.
        generation: what the client follows.
        dialect: how to encode it.
        visitor: the client.
        after: the seq of the last piece that the client has.
        limit: characters that an event may merge.
        grace: returns the seconds in which a client that leaves now can come back; 0 if it cannot,
            None for those of the settings.
        request: the ``request`` of the prompt.
        silence: seconds without an event after which a comment is written.
        on_closed: called once the response has ended.
    """

    def __init__(
        self,
        hub: Hub,
        generation: Generation,
        dialect: StreamDialect,
        visitor: Visitor,
        *,
        after: int,
        limit: int,
        grace: Callable[[], float | None],
        request: str | None,
        silence: float,
        on_closed: Callable[["ReplyStream"], None],
    ) -> None:
        self._hub = hub
        self._generation = generation
        self._dialect = dialect
        self._visitor = visitor
        self._grace = grace
        self._silence = silence
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._body: BodyWriter | None = None
        self._began = self._written = 0.0  # when the body began; when the last event was written
        self._sent = 0  # bytes of all events
        self._after = self._seq = after  # the last piece before and in the body
        self._end: StreamEnd = "disconnected"
        self._timer: asyncio.TimerHandle | None = None
        self._cursor: Cursor | None = Cursor(generation, self, dialect, self, limit)
        hub.follow(generation, self._cursor)
        self._cursor.begin(after, limit, shown=False, request=request)

    # The producer of the body.

    def open(self, body: BodyWriter) -> None:
        """Write what there is."""
        self._body = body
        self._began = self._written = self._loop.time()
        self._hub.metrics.stream_opened()
        self._set_timer()
        self.wake()

    def wake(self) -> None:
        """Go on writing: the client has caught up."""
        if self._cursor is not None and self._cursor.behind:
            self._cursor.wake()

    def closed(self) -> None:
        """Follow no more. A generation without followers is stopped after the grace time."""
        body, self._body = self._body, None
        if self._timer is not None:
            self._timer.cancel()
        self._unfollow(lost=True)
        if body is not None:
            self._report(body)
        self._on_closed(self)

    def _report(self, body: BodyWriter) -> None:
        """Count and log the end of the response."""
        self._hub.metrics.stream_closed(self._end)
        principal = self._visitor.principal
        log.info(
            "stream",
            socket=body.id,
            id=self._generation.id,
            address=self._visitor.address,
            principal=None if principal is None else principal.name,
            seconds=round(self._loop.time() - self._began, 3),
            pieces=self._seq - self._after,
            bytes=self._sent,
            end=self._end,
        )

    # The sink of the cursor.

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._body is not None and self._body.writable

    def write(self, frame: bytes) -> None:
        """Write events; nothing if a dialect has none for a piece."""
        if frame and self._body is not None:
            self._written = self._loop.time()
            self._sent += len(frame)
            self._body.write(frame)

    # The reader of the cursor.

    def merged(self, pieces: int) -> None:
        """Count the pieces of an event that has several."""
        self._hub.metrics.pieces_merged(pieces)

    def leave(self, _: Cursor) -> None:
        """End the body: its terminal is written."""
        self._end = "complete"
        self._unfollow(lost=False)
        if self._body is not None:
            self._body.end()

    def fail(self, error: Exception) -> None:
        """Abort the response, as its cursor has failed."""
        log.error("cursor failed", failure=error)
        self._end = "failed"
        if self._body is not None:
            self._body.abort()

    def _unfollow(self, *, lost: bool) -> None:
        """Follow no more, unless this was called before; see :meth:`Hub.unfollow`."""
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            self._seq = cursor.seq
            self._hub.unfollow(self._generation, cursor, lost=lost, grace=self._grace())

    # Time.

    def _set_timer(self) -> None:
        """Set the timer for the next comment, or for the end of the login."""
        left = self._written + self._silence - self._loop.time()
        principal = self._visitor.principal
        if principal is not None and principal.expires is not None:
            until = principal.expires - time.time()
            if until <= 0:
                self._shut_out("The token has expired.")
                return
            left = min(left, until)
        self._timer = self._loop.call_later(max(0.0, left), self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if now >= self._written + self._silence:
            if self.writable:
                self.write(self._dialect.comment)
            self._written = now  # a client that does not read has a deadline
        self._set_timer()

    # Tokens that are checked again.

    async def is_still_valid(self) -> bool:
        """Check again whether the client's credentials are valid; their expiry may have changed."""
        valid = await self._visitor.is_still_valid()
        if valid and self._body is not None and self._timer is not None:
            self._timer.cancel()
            self._set_timer()
        return valid

    def revoke(self) -> None:
        """End the response: the client's credentials are not valid any more."""
        self._shut_out("The token is no longer valid.")

    def _shut_out(self, why: str) -> None:
        """End the response with an error. A generation that nobody else follows is stopped."""
        if self._body is None or self._cursor is None:
            return
        refused = Refused(Code.UNAUTHENTICATED, why)
        self.write(self._dialect.error(error_frame(self._hub.metrics, "none", refused, None)))
        self._end, self._grace = "unauthenticated", lambda: 0
        self._unfollow(lost=True)
        self._body.end()
