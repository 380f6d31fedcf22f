"""One client: the connection answers each frame at once, queues it, or refuses it.

A connection uses a small transport and no network library, so that tests need no sockets. If the
client reads, text is written in the call that appends it to the log. A stop takes effect in the
call that receives it. Requests that need the store wait in a queue.
"""

import asyncio
import contextlib
import time

from wsserver.admission import Visitor
from wsserver.connections.following import Following
from wsserver.connections.requests import REQUESTS, Requests
from wsserver.connections.session import Session, Transport, name_frame
from wsserver.connections.stopping import Stopping
from wsserver.dialects.v1 import V1
from wsserver.errors import Code, Refused, StoreError
from wsserver.generation import State
from wsserver.hub.hub import Hub
from wsserver.limits import Bucket, memory_size
from wsserver.parsing import count_parts, first_request, parse
from wsserver.protocol import (
    ClientFrame,
    Close,
    Hello,
    Limits,
    Ping,
    Pong,
    Prompt,
    Stop,
    Stopped,
)
from wsserver.settings import Settings
from wsserver.text import well_formed

AUTH_PARTS = 64  # largest `count_parts` of a frame before `auth`; an `auth` has about ten
LONGEST_STOP = 256  # bytes: a longer frame is not a `stop`; over the rate it is not parsed
V1_FRAMES = V1()


class Connection:
    """Serves one client.

    Args:
        transport: sends data to the client.
        hub: has the generations.
        settings: the limits.
        visitor: the principal of the client, once the client has authenticated.
    """

    __slots__ = (
        "_bucket",
        "_expiry",
        "_following",
        "_requests",
        "_session",
        "_stops",
        "_wasted",
        "frames",
        "last_frame",
    )

    def __init__(
        self, transport: Transport, hub: Hub, settings: Settings, visitor: Visitor
    ) -> None:
        self.frames = 0  # number of received frames
        # When the last frame other than `ping` arrived, by the event loop's clock.
        self.last_frame = asyncio.get_running_loop().time()
        self._session = Session(transport, hub, settings, visitor)
        self._following = Following(self._session, V1_FRAMES)
        self._requests = Requests(self._session, self._following, self)
        self._bucket = Bucket(settings.frame_rate, settings.frame_burst, self.last_frame)
        self._wasted = 0  # frames in a row that were unusable or over the rate
        self._stops = 0  # stops that wait for their answer
        self._expiry: asyncio.TimerHandle | None = None
        self._set_expiry()
        if visitor.principal is not None:
            hub.readiness.warm()

    @property
    def principal(self) -> str | None:
        """The name of the principal; None before the client has authenticated."""
        principal = self._session.visitor.principal
        return None if principal is None else principal.name

    @property
    def idle_since(self) -> float | None:
        """When the last request arrived, by the event loop's clock; None while one runs."""
        return None if self._following.cursors or self._requests else self.last_frame

    def greet(self) -> None:
        """Send ``hello``: the limits, and whether the client has to send ``auth``."""
        settings, principal = self._session.settings, self._session.visitor.principal
        limits = Limits(
            message_size=settings.message_size,
            prompt_size=settings.prompt_size,
            answer_size=settings.answer_size,
            frame_rate=settings.frame_rate,
            frame_burst=settings.frame_burst,
            bad_frames=settings.bad_frames,
            requests=REQUESTS,
            generations_per_socket=settings.generations_per_socket,
            queue_size=settings.queue_size,
        )
        if principal is None:
            self._session.write(Hello(auth=True, limits=limits))
        else:
            name, models = well_formed(principal.name), self._session.hub.scheduler.models
            self._session.write(Hello(principal=name, models=models, limits=limits))

    def wake(self) -> None:
        """Continue with the answers and the generations: the client reads again."""
        self._requests.wake()
        self._following.wake()

    async def delivered(self) -> None:
        """Wait until the client has all frames that it follows, or has disconnected."""
        while self._following.cursors or self._requests:
            await self._requests.wait_done()
            await self._following.wait_done()

    def detach(self, *, lost: bool = False) -> None:
        """Stop following, and drop the requests: the client has disconnected.

        Args:
            lost: the connection died, and the client may not have noticed yet.
        """
        self._session.ended = True
        if self._expiry is not None:
            self._expiry.cancel()
        self._requests.detach()
        self._following.detach(lost=lost)

    def _close(self, code: Close, reason: str) -> None:
        """Ignore further frames, and close the connection."""
        self._session.end(code, reason)
        self._requests.drop()

    # Receiving.

    def receive(self, message: str | bytes) -> None:
        """Answer one message, now or after earlier requests."""
        if self._session.ended:
            return
        self.frames += 1
        now = asyncio.get_running_loop().time()
        frame, wait = None, self._bucket.consume(now)
        stranger = self.principal is None and not self._requests.authenticating
        try:
            frame = self._parse(message, stranger, wait)
            self._dispatch(frame, stranger, wait, memory_size(message))
            # A ping does not reset the count, nor does a frame before authentication.
            if not (stranger or isinstance(frame, Ping)):
                self._wasted = 0
        except Refused as refused:
            self._refuse(refused, frame, message)
            if frame is None or wait:
                self._wasted += 1
        if not isinstance(frame, Ping):
            self.last_frame = now
        if self.frames == 1 and frame is not None and not isinstance(frame, Prompt):
            self._session.hub.readiness.warm()
        if self._wasted >= self._session.settings.bad_frames:
            self._close(Close.POLICY_VIOLATION, "too many unusable frames")

    def _parse(self, message: str | bytes, stranger: bool, wait: float) -> ClientFrame:  # noqa: FBT001
        """Parse a frame. Refuse without parsing if its size or its number of parts is enough."""
        if wait and len(message) > LONGEST_STOP:
            raise Refused(
                Code.LIMIT, "Too many requests at once. Try again in a moment.", retry_after=wait
            )
        if isinstance(message, bytes):
            raise Refused(Code.INVALID_FRAME, "Send JSON as text frames, not binary ones.")
        if stranger and count_parts(message) > AUTH_PARTS:
            self._session.check_authenticated()
        return parse(message)

    def _dispatch(self, frame: ClientFrame, stranger: bool, wait: float, size: int) -> None:  # noqa: FBT001
        """Answer a frame, or queue it.

        Args:
            frame: the frame.
            stranger: the client has not authenticated, and none of its ``auth`` frames waits.
            wait: seconds until the frame rate allows another frame; 0 if it allows this one.
            size: bytes of its message in memory.
        """
        if isinstance(frame, Stop):
            if stranger:
                self._session.check_authenticated()
            self._stop(frame, wait)
        elif wait:
            raise Refused(
                Code.LIMIT, "Too many requests at once. Try again in a moment.", retry_after=wait
            )
        elif isinstance(frame, Ping):
            self._session.write(Pong(request=frame.request))
        else:
            self._requests.put(frame, size)

    def _refuse(self, refused: Refused, frame: ClientFrame | None, message: str | bytes) -> None:
        """Send the error of a frame, after the answers to the frames before it."""
        if frame is not None:
            name_frame(refused, frame)
        elif isinstance(message, str):
            refused.request = refused.request or first_request(message)
        if not self._requests.put_refused(refused):
            self._session.refuse(refused, frame)

    # Stops.

    def _stop(self, stop: Stop, wait: float) -> None:
        """Stop the generations that a frame names. Answer when all of them have ended.

        Raises:
            Refused: there is nothing to stop.
        """
        following, owner = self._following, self.principal
        prompts = self._requests.prompts(stop.id)
        if stop.id is None:
            # Queued generations first: otherwise the end of the running one would start them.
            targets = sorted(following.cursors, key=lambda g: g.state is not State.QUEUED)
        else:
            known = None if owner is None else self._session.hub.known(owner, stop.id)
            targets = [] if known is None else [known]
        # Many stops of one generation must not add many followers to its log.
        flood = bool(wait) or self._stops >= REQUESTS
        settled = {State.STOPPING, State.SAVING, State.ENDED} if flood else {State.ENDED}
        running = [generation for generation in targets if generation.state not in settled]
        if flood:
            prompts = [waiting for waiting in prompts if not waiting.stops]
        if not (prompts or running):
            if stop.id is None or owner is None or self._session.hub.elsewhere is None or flood:
                raise Refused(Code.NOT_RUNNING)
            self._stops += 1
            work = self._stop_elsewhere(
                owner, stop.id, Stopping(self._session.hub, stop, self._stopped)
            )
            self._session.hub.wait_at_close(asyncio.get_running_loop().create_task(work))
            return
        self._stops += 1
        stopping = Stopping(self._session.hub, stop, self._stopped)
        for waiting in prompts:
            stopping.expect()
            waiting.stops.append(stopping)
        for generation in running:
            stopping.stop(generation)
        stopping.complete_one()

    async def _stop_elsewhere(self, owner: str, name: str, stopping: Stopping) -> None:
        """Stop a generation that another node may run."""
        with contextlib.suppress(Refused, StoreError):
            found = await self._session.hub.find_live(owner, name, self._session.account)
            if found is not None:
                stopping.stop(found)
        stopping.complete_one()

    def _stopped(self, stopping: Stopping) -> None:
        """Answer a ``stop``: its generations have ended, or its prompts were refused."""
        self._stops -= 1
        stop, ids = stopping.frame, stopping.ids
        if self._session.ended:
            return
        if not ids:
            self._session.fail(stopping.refused, stop)
        elif stop.request is not None:
            self._session.write(Stopped(ids=ids, request=stop.request))

    # Authentication.

    def authenticated(self) -> None:
        """Set the timer for the expiry of the token: an ``auth`` was accepted."""
        self._set_expiry()

    def not_authenticated(self, refused: Refused) -> None:
        """Close the connection: the first ``auth`` failed."""
        code = Close.TRY_AGAIN_LATER if refused.retryable else Close.POLICY_VIOLATION
        self._close(code, refused.code)

    async def is_still_valid(self) -> bool:
        """Check again whether the client's credentials are valid; their expiry may have changed."""
        visitor = self._session.visitor
        before = visitor.principal
        valid = await visitor.is_still_valid()
        if visitor.principal is not before and not self._session.ended:
            self._set_expiry()
        return valid

    def revoke(self) -> None:
        """Close the connection, and stop the client's generations without other followers."""
        for generation, cursor in tuple(self._following.cursors.items()):
            if cursor.own and generation.readers == 1:
                self._session.hub.stop(generation, "disconnect")
        self.shut_out("The token is no longer valid.")

    def shut_out(self, why: str) -> None:
        """Send ``unauthenticated``, and close the connection."""
        if not self._session.ended:
            self._session.refuse(Refused(Code.UNAUTHENTICATED, why), None)
            self._close(Close.POLICY_VIOLATION, "unauthenticated")

    def _set_expiry(self) -> None:
        """Set the timer for the first ``auth``, or for the expiry of the token."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        principal = self._session.visitor.principal
        if principal is None:
            delay, why = self._session.settings.auth_timeout, "No `auth` frame came in time."
        elif principal.expires is not None:
            delay, why = principal.expires - time.time(), "The token has expired."
        else:
            return
        self._expiry = asyncio.get_running_loop().call_later(max(0.0, delay), self.shut_out, why)
