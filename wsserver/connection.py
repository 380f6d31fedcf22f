"""One client: frames in, to the hub; logs, out as frames.

It sees a small transport and not a library, so that it can be tested without sockets and serve
over another one. Nothing here waits: a frame is answered in the call that brings it, and text is
written in the call that appends it, if the client can take it.
"""

import asyncio
import logging
import secrets
from typing import Protocol

from wsserver.errors import Code, Refused
from wsserver.generation import State
from wsserver.hub import Generation, Hub
from wsserver.protocol import Error, Ping, Pong, Prompt, Start, Stop, encode, encode_run, parse
from wsserver.settings import Settings

__all__ = ["Connection", "Transport"]

logger = logging.getLogger("wsserver")


class Transport(Protocol):
    """The way to one client."""

    @property
    def writable(self) -> bool:
        """Whether the client keeps up; if not, :meth:`Connection.wake` is called once it does."""
        ...

    def write(self, frame: bytes) -> None:
        """Send a frame at once or buffer it. Does nothing once the client is gone."""
        ...


class _Cursor:
    """Where one client is in one generation's log. A follower of that log."""

    __slots__ = ("_connection", "generation", "seq")

    def __init__(self, connection: "Connection", generation: Generation) -> None:
        self._connection = connection
        self.generation = generation
        self.seq = 0

    def wake(self) -> None:
        """Write all that is new, for as long as the client takes it."""
        connection, generation = self._connection, self.generation
        transport, log = connection.transport, generation.log
        while transport.writable:
            if self.seq < log.seq:
                run = log.read(self.seq, connection.settings.frame_size)
                self.seq = run.seq
                transport.write(encode_run(generation.id, run))
            elif log.terminal is not None:
                transport.write(encode(log.terminal))
                connection.leave(self)
                return
            else:
                return


class Connection:
    """A client's side of the hub.

    Args:
        transport: the way to the client.
        hub: where generations live.
        settings: the limits that hold here.
    """

    __slots__ = ("_bad_frames", "_cursors", "_delivered", "_hub", "_own", "settings", "transport")

    def __init__(self, transport: Transport, hub: Hub, settings: Settings) -> None:
        self.transport = transport
        self.settings = settings
        self._hub = hub
        self._own: str | None = None
        self._cursors: dict[Generation, _Cursor] = {}
        self._bad_frames = 0
        self._delivered: asyncio.Future[None] | None = None

    def receive(self, message: str | bytes) -> bool:
        """Answer one message.

        Returns:
            False when the client has sent too much nonsense in a row and should be turned away.
        """
        frame = None
        try:
            if isinstance(message, bytes):
                raise Refused(Code.INVALID_FRAME, "Send JSON as text frames, not binary ones.")
            frame = parse(message)
            self._bad_frames = 0
            match frame:
                case Prompt():
                    self._prompt(frame)
                case Stop():
                    self._stop(frame)
                case Ping():
                    self.transport.write(encode(Pong()))
        except Refused as refused:
            refused.about = refused.about or getattr(frame, "id", None)
            self._refuse(refused)
            if frame is None:
                self._bad_frames += 1
        return self._bad_frames < self.settings.bad_frames

    def wake(self) -> None:
        """The client can take more: let each generation go on from where it was."""
        # The first to be served now is the last next time, so that none waits for ever.
        for generation, cursor in tuple(self._cursors.items()):
            if not self.transport.writable:
                return
            if cursor.seq < generation.log.seq or generation.log.terminal is not None:
                del self._cursors[generation]
                self._cursors[generation] = cursor
                cursor.wake()

    def leave(self, cursor: _Cursor) -> None:
        """Follow a generation no more."""
        del self._cursors[cursor.generation]
        self._hub.unfollow(cursor.generation, cursor)
        if not self._cursors and self._delivered is not None and not self._delivered.done():
            self._delivered.set_result(None)

    def detach(self) -> None:
        """The client is gone: leave all that it followed."""
        for cursor in tuple(self._cursors.values()):
            self.leave(cursor)

    async def delivered(self) -> None:
        """Wait until the client has got all that it follows, terminals included, or is gone."""
        if self._cursors:
            self._delivered = asyncio.get_running_loop().create_future()
            await self._delivered

    def _prompt(self, prompt: Prompt) -> None:
        known = self._hub.find(prompt.id) is not None
        if not known and self._active(prompt) >= self.settings.generations_per_socket:
            raise Refused(Code.LIMIT, "This socket runs as many generations as it may.")
        generation = self._hub.prompt(prompt, self._own)
        conversation = generation.conversation
        if prompt.conversation is None and conversation is not None:
            self._own = conversation.id
        self.transport.write(
            encode(
                Start(
                    id=generation.id,
                    conversation=None if conversation is None else conversation.id,
                    model=generation.model,
                    queued=self._place(generation),
                )
            )
        )
        cursor = self._cursors.get(generation)
        if cursor is None:
            cursor = self._cursors[generation] = _Cursor(self, generation)
            self._hub.follow(generation, cursor)
        # After each `start` comes everything, so that a client need not know what it has had.
        cursor.seq = 0
        cursor.wake()

    def _place(self, generation: Generation) -> int | None:
        # Who interrupts waits for no more than a request to be closed.
        return generation.queued if generation.prompt.on_busy == "queue" else None

    def _stop(self, stop: Stop) -> None:
        if stop.id is None:
            # Those that wait first: else they would begin as the one before them ends.
            targets = sorted(self._cursors, key=lambda g: g.log.state is not State.QUEUED)
        else:
            targets = [g for g in (self._hub.find(stop.id),) if g is not None]
        running = [generation for generation in targets if generation.log.state is not State.ENDED]
        if not running:
            raise Refused(Code.NOT_RUNNING)
        for generation in running:
            self._hub.stop(generation, "client")

    def _active(self, prompt: Prompt) -> int:
        """Count what runs or waits here, without what the prompt would replace."""
        name = prompt.conversation or self._own
        replaced = name if prompt.on_busy == "interrupt" and prompt.messages is None else None
        return sum(
            generation.log.state in {State.QUEUED, State.RUNNING}
            and (generation.conversation is None or generation.conversation.id != replaced)
            for generation in self._cursors
        )

    def _refuse(self, refused: Refused) -> None:
        ref = secrets.token_hex(4)
        logger.info("%s: refused a frame: %s", ref, refused.code)
        self.transport.write(
            encode(
                Error(
                    code=refused.code,
                    message=refused.message,
                    about=refused.about,
                    retryable=refused.retryable,
                    retry_after=refused.retry_after,
                    ref=ref,
                )
            )
        )
