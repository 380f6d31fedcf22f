"""One client: frames in, to the hub; logs, out as frames.

It sees a small transport and not a library, so that it can be tested without sockets and serve
over another one. Text is written in the call that appends it, if the client can take it. A stop is
obeyed in the call that brings it; what needs the store waits for it in a queue of its own.
"""

import asyncio
import functools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from json.encoder import encode_basestring
from typing import Protocol

from wsserver.admission import Visitor
from wsserver.errors import Code, Refused, StoreError
from wsserver.generation import State, well_formed
from wsserver.hub import Hub
from wsserver.limits import Bucket
from wsserver.live import Conversation, Generation
from wsserver.logs import log
from wsserver.protocol import (
    Auth,
    Authenticated,
    ClientFrame,
    Close,
    ConversationItem,
    Conversations,
    Delete,
    Deleted,
    Error,
    History,
    HistoryMessage,
    List,
    Open,
    Ping,
    Pong,
    Prompt,
    Rename,
    Renamed,
    Resume,
    Start,
    Stop,
    encode,
    parse,
)
from wsserver.settings import ESCAPED, Settings
from wsserver.stores.base import Turn

__all__ = ["Connection", "Transport"]

REQUESTS = 32  # of one client that wait for the store; it gets `limit` for more
FRAME_ROOM = 4096  # bytes of a `history` frame besides its messages


class Transport(Protocol):
    """The way to one client."""

    @property
    def writable(self) -> bool:
        """Whether the client keeps up; if not, :meth:`Connection.wake` is called once it does."""
        ...

    def write(self, frame: bytes) -> None:
        """Send a frame at once or buffer it. Does nothing once the client is gone."""
        ...

    def end(self, code: Close, reason: str) -> None:
        """Close the connection, after what was written before."""
        ...


Request = Auth | Prompt | Resume | Open | List | Rename | Delete


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request that waits for the store. ``stopped``: the client has already thought better."""

    request: Request
    stopped: bool = False


class _Cursor:
    """Where one client is in one generation's log. A follower of that log."""

    __slots__ = ("_connection", "generation", "own", "seq", "start")

    def __init__(self, connection: "Connection", generation: Generation) -> None:
        self._connection = connection
        self.generation = generation
        self.own = False  # started here, and not only followed
        self.start: Callable[[], bytes] | None = None  # what has to be written before all else
        self.seq = 0

    def wake(self) -> None:
        """Write all that is new, for as long as the client takes it."""
        connection, generation = self._connection, self.generation
        transport, log = connection.transport, generation.log
        while transport.writable:
            if self.start is not None:
                start, self.start = self.start, None
                transport.write(start())
            elif self.seq < log.seq:
                run, frame = generation.frame(self.seq, connection.settings.frame_size)
                if run.seq - self.seq > 1:
                    connection.metrics.pieces_merged(run.seq - self.seq)
                self.seq = run.seq
                transport.write(frame)
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
        visitor: who the client acts for, or has yet to say.

    Attributes:
        frames: how many came.
        heard: when the last one came that was no ``ping``, by the event loop's clock.
    """

    __slots__ = (
        "_bucket",
        "_cursors",
        "_ended",
        "_expiry",
        "_gone",
        "_hub",
        "_idle",
        "_loop",
        "_own",
        "_visitor",
        "_waiting",
        "_wasted",
        "_watched",
        "_worker",
        "_writable",
        "frames",
        "heard",
        "metrics",
        "settings",
        "transport",
    )

    def __init__(
        self, transport: Transport, hub: Hub, settings: Settings, visitor: Visitor
    ) -> None:
        self.transport = transport
        self.settings = settings
        self.frames = 0
        self.metrics = hub.metrics
        self._hub = hub
        self._visitor = visitor
        self._loop = asyncio.get_running_loop()
        self.heard = self._loop.time()
        self._bucket = Bucket(settings.frame_rate, settings.frame_burst, self.heard)
        self._own: str | None = None  # the conversation that goes on where a prompt names none
        self._cursors: dict[Generation, _Cursor] = {}
        # Of the kinds that take little while empty, as most are: of tens of thousands of clients.
        self._watched: dict[Conversation, None] = {}
        self._waiting: list[_Waiting] = []  # few, see REQUESTS
        self._worker: asyncio.Task[None] | None = None  # answers what waits; only while it does
        self._wasted = 0  # frames in a row that were unusable, or too many
        self._ended = False  # no more is heard of this client
        self._gone = False
        self._expiry: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None  # what the worker waits for
        self._set_expiry()

    @property
    def principal(self) -> str | None:
        """Who the client acts for; None as long as it has not said so."""
        principal = self._visitor.principal
        return None if principal is None else principal.name

    @property
    def idle_since(self) -> float | None:
        """When it last wanted anything, by the event loop's clock; None while it still does."""
        return None if self._cursors or self._waiting else self.heard

    def receive(self, message: str | bytes) -> None:
        """Answer one message, now or when the store has told what is needed for it."""
        if self._ended:
            return
        self.frames += 1
        frame, wait = None, 0.0
        try:
            if isinstance(message, bytes):
                raise Refused(Code.INVALID_FRAME, "Send JSON as text frames, not binary ones.")
            frame = parse(message)
            if isinstance(frame, Stop) and self._stop(frame):
                pass  # obeyed, however many frames came before it
            else:
                wait = self._bucket.take(self._loop.time())
                self._take(frame, wait)
            self._wasted = 0
        except Refused as refused:
            refused.about = refused.about or _id_of(frame)
            self._refuse(refused, frame)
            if frame is None or wait:
                self._wasted += 1
        if not isinstance(frame, Ping):
            self.heard = self._loop.time()
        if self._wasted >= self.settings.bad_frames:
            self._end(Close.POLICY_VIOLATION, "too many unusable frames")

    def _take(self, frame: ClientFrame, wait: float) -> None:
        if isinstance(frame, Stop):
            raise Refused(Code.NOT_RUNNING)
        if wait:
            raise Refused(Code.LIMIT, "Too many frames at once.", retry_after=wait)
        if isinstance(frame, Ping):
            self.transport.write(encode(Pong()))
        else:
            self._queue(frame)

    def _end(self, code: Close, reason: str) -> None:
        """Hear no more of the client, and close the connection."""
        self._ended = True
        self._drop_requests()
        self.transport.end(code, reason)

    # Who it is.

    @property
    def _owner(self) -> str:
        if self._visitor.principal is None:
            raise Refused(
                Code.UNAUTHENTICATED, 'Say first who you are: {"type": "auth", "token": "…"}.'
            )
        return self._visitor.principal.name

    async def _authenticate(self, auth: Auth) -> None:
        principal = await self._visitor.authenticate(auth.token)
        self._set_expiry()
        self.transport.write(
            encode(Authenticated(principal=well_formed(principal.name), expires=principal.expires))
        )

    def _set_expiry(self) -> None:
        """Shut the client out when it has not said in time who it is, or when that ends."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        principal = self._visitor.principal
        if principal is None:
            delay, why = self.settings.auth_timeout, "No `auth` frame came in time."
        elif principal.expires is not None:
            delay, why = principal.expires - time.time(), "The token has expired."
        else:
            return
        self._expiry = self._loop.call_later(max(0.0, delay), self.shut_out, why)

    async def still_welcome(self) -> bool:
        """Whether the client would be let in again now; how long for may have changed."""
        before = self._visitor.principal
        welcome = await self._visitor.still_welcome()
        if self._visitor.principal is not before and not self._gone:
            self._set_expiry()
        return welcome

    def revoke(self) -> None:
        """The client is not welcome any more: shut it out, and stop what it alone asked for."""
        for generation, cursor in tuple(self._cursors.items()):
            if cursor.own and generation.readers == 1:
                self._hub.stop(generation, "disconnect")
        self.shut_out("The token is not valid any more.")

    def shut_out(self, why: str) -> None:
        """Tell the client that it acts for nobody any more, and close the connection."""
        if not self._ended and not self._gone:
            self._refuse(Refused(Code.UNAUTHENTICATED, why), None)
            self._end(Close.POLICY_VIOLATION, "unauthenticated")

    # What is written.

    def wake(self) -> None:
        """The client can take more: let each generation go on from where it was."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        # The first to be served now is the last next time, so that none waits for ever.
        for generation, cursor in tuple(self._cursors.items()):
            if not self.transport.writable:
                return
            log = generation.log
            if cursor.start or cursor.seq < log.seq or log.terminal is not None:
                del self._cursors[generation]
                self._cursors[generation] = cursor
                cursor.wake()

    def attach(self, generation: Generation) -> None:
        """Follow what somebody else has asked in a conversation that is watched here."""
        self._follow(generation, shown=True)

    def drop(self, conversation: Conversation) -> None:
        """Tell that a conversation which is watched here was deleted elsewhere."""
        self._watched.pop(conversation, None)
        if self._own == conversation.id:
            self._own = None
        self.transport.write(encode(Deleted(conversation=conversation.id)))

    def leave(self, cursor: _Cursor) -> None:
        """Follow a generation no more."""
        del self._cursors[cursor.generation]
        self._hub.unfollow(cursor.generation, cursor)
        self._check_idle()

    def detach(self) -> None:
        """The client is gone: leave all that it followed, and drop what it still asked for."""
        self._gone = True
        if self._expiry is not None:
            self._expiry.cancel()
        self._drop_requests()
        for conversation in self._watched:
            conversation.watchers.discard(self)
        self._watched.clear()
        for cursor in tuple(self._cursors.values()):
            self.leave(cursor)
        self._check_idle()

    def _drop_requests(self) -> None:
        """Forget what only this client wanted to know, but not what it wanted to be done."""
        lasting = [w for w in self._waiting if isinstance(w.request, Rename | Delete)]
        if self._worker is not None and not (lasting and lasting[0] is self._waiting[0]):
            self._worker.cancel()
            self._worker = asyncio.get_running_loop().create_task(self._work()) if lasting else None
        self._waiting = lasting

    async def delivered(self) -> None:
        """Wait until the client has got all that it follows, terminals included, or is gone."""
        if self._cursors or self._waiting:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    def _check_idle(self) -> None:
        idle = not self._cursors and not self._waiting
        if idle and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    # What needs the store.

    def _queue(self, request: Request) -> None:
        if len(self._waiting) >= REQUESTS:
            raise Refused(Code.LIMIT, "Too many requests of this socket wait.")
        self._waiting.append(_Waiting(request))
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        """Answer what waits, in order, so that a client may rely on it."""
        try:
            while self._waiting:
                waiting = self._waiting[0]
                # One that asks for much and reads little gets the next answer when it has.
                while not (self.transport.writable or self._gone):
                    self._writable = asyncio.get_running_loop().create_future()
                    await self._writable
                try:
                    await self._answer(waiting)
                except (Refused, StoreError) as error:
                    refused = error if isinstance(error, Refused) else Refused(Code.STORE)
                    refused.about = _id_of(waiting.request)
                    cause = None if refused is error else error
                    self._refuse(refused, waiting.request, cause)
                    if isinstance(waiting.request, Auth) and self.principal is None:
                        self._turn_away(refused)
                        return
                except Exception as error:  # noqa: BLE001
                    self._refuse(Refused(Code.INTERNAL), waiting.request, error)
                self._waiting.pop(0)
        finally:
            if self._worker is asyncio.current_task():  # and not dropped for another
                self._worker = None
            self._check_idle()

    def _turn_away(self, refused: Refused) -> None:
        """Close on one that could not say who it is; it may guess again in a new connection."""
        later = refused.retryable
        self._end(Close.TRY_AGAIN_LATER if later else Close.POLICY_VIOLATION, refused.code)

    async def _answer(self, waiting: _Waiting) -> None:
        match waiting.request:
            case Auth() as auth:
                await self._authenticate(auth)
            case Prompt() as prompt:
                generation = await self._prompt(prompt)
                if waiting.stopped:
                    self._hub.stop(generation, "client")
            case Resume() as resume:
                await self._resume(resume)
            case Open() as request:
                await self._open(request)
            case List() as request:
                await self._list(request)
            case Rename(conversation=name, title=title):
                await self._hub.conversations.rename(name, self._owner, title)
                self.transport.write(encode(Renamed(conversation=name, title=title)))
            case Delete(conversation=name):
                await self._hub.delete(name, self._owner, self)
                if self._own == name:
                    self._own = None
                self.transport.write(encode(Deleted(conversation=name)))

    async def _prompt(self, prompt: Prompt) -> Generation:
        owner = self._owner
        known = self._hub.known(owner, prompt.id) is not None
        if not known and self._active(prompt) >= self.settings.generations_per_socket:
            raise Refused(Code.LIMIT, "This socket runs as many generations as it may.")
        generation = await self._hub.prompt(prompt, owner, self._visitor.account, self._own, self)
        if prompt.conversation is None and generation.conversation_id is not None:
            self._own = generation.conversation_id
        # After each `start` comes everything, so that a client need not know what it has had.
        self._follow(generation, own=True)
        return generation

    async def _resume(self, resume: Resume) -> None:
        generation = await self._hub.find(self._owner, resume.id)
        if generation is None:
            raise Refused(Code.NOT_FOUND)
        if resume.after > generation.log.seq:
            raise Refused(Code.GAP)
        self._follow(generation, after=resume.after)

    async def _open(self, request: Open) -> None:
        conversation, stored, older = await self._hub.conversations.history(
            request.conversation, self._owner, request.before
        )
        turns = self._fitting(stored.turns)
        older = older or len(turns) < len(stored.turns)
        self.transport.write(
            encode(
                History(
                    conversation=conversation.id,
                    title=stored.title,
                    messages=[message for turn in turns for message in _messages(turn)],
                    running=[generation.id for generation in conversation.live],
                    before=turns[0].number if turns and older else None,
                )
            )
        )
        if request.before is None:
            self._own = conversation.id
            self._watched[conversation] = None
            conversation.watchers.add(self)
            for generation in conversation.live:
                self._follow(generation, shown=True)

    def _fitting(self, turns: list[Turn]) -> list[Turn]:
        """Return the newest turns that one frame can hold; one alone is cut to what it can."""
        room = self.settings.max_unsent - self.settings.write_buffer - FRAME_ROOM
        kept: list[Turn] = []
        for turn in reversed(turns):
            size = 256 + _size(turn.prompt) + _size(turn.text)
            if size > room and kept:
                break
            kept.append(turn if size <= room else _beginning(turn, room))
            room -= size
        kept.reverse()
        return kept

    async def _list(self, request: List) -> None:
        before = None
        if request.before is not None:
            updated, _, name = request.before.partition(":")
            try:
                before = (float(updated), name)
            except ValueError:
                raise Refused(Code.INVALID_FRAME, "before: must be the `next` of a page.") from None
        found = await self._hub.conversations.recent(self._owner, request.limit + 1, before)
        page = found[: request.limit]
        last = page[-1] if len(found) > len(page) else None
        self.transport.write(
            encode(
                Conversations(
                    items=[
                        ConversationItem(
                            id=item.id,
                            title=item.title,
                            created=item.created,
                            updated=item.updated,
                        )
                        for item in page
                    ],
                    next=None if last is None else f"{last.updated!r}:{last.id}",
                )
            )
        )

    # Following and stopping.

    def _follow(
        self, generation: Generation, after: int = 0, *, own: bool = False, shown: bool = False
    ) -> None:
        """Say that a generation is there, and follow it from a piece on.

        Args:
            generation: which.
            after: the seq of the last piece that the client has.
            own: it was started here, and counts as one of this client's.
            shown: the client does not know the prompt yet.
        """
        cursor = self._cursors.get(generation)
        if cursor is None:
            cursor = self._cursors[generation] = _Cursor(self, generation)
            self._hub.follow(generation, cursor)
        cursor.own = cursor.own or own
        cursor.start = functools.partial(_start, generation, shown=shown)
        cursor.seq = after
        cursor.wake()

    def _stop(self, stop: Stop) -> bool:
        """Stop what is asked for; False where there is nothing to stop."""
        waiting = [
            waiting
            for waiting in self._waiting
            if isinstance(waiting.request, Prompt) and stop.id in {None, waiting.request.id}
        ]
        if stop.id is None:
            # Those that wait first: else they would begin as the one before them ends.
            targets = sorted(self._cursors, key=lambda g: g.log.state is not State.QUEUED)
        else:
            owner = self.principal
            known = None if owner is None else self._hub.known(owner, stop.id)
            targets = [] if known is None else [known]
        running = [generation for generation in targets if generation.log.state is not State.ENDED]
        for request in waiting:
            request.stopped = True
        for generation in running:
            self._hub.stop(generation, "client")
        return bool(running or waiting)

    def _active(self, prompt: Prompt) -> int:
        """Count what was started here and runs or waits, without what the prompt would replace."""
        name = prompt.conversation or self._own
        replaced = name if prompt.on_busy == "interrupt" and prompt.messages is None else None
        return sum(
            cursor.own
            and generation.log.state in {State.QUEUED, State.RUNNING}
            and (generation.conversation_id is None or generation.conversation_id != replaced)
            for generation, cursor in self._cursors.items()
        )

    def _refuse(
        self, refused: Refused, frame: ClientFrame | None, cause: Exception | None = None
    ) -> None:
        ref = secrets.token_hex(4)
        self.metrics.frame_refused("none" if frame is None else frame.type, refused.code)
        if cause is None:
            log.debug("frame refused", ref=ref, code=refused.code)
        else:
            reason = str(cause) if isinstance(cause, StoreError) else None
            log.error("frame failed", ref=ref, code=refused.code, reason=reason, failure=cause)
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


def _start(generation: Generation, *, shown: bool) -> bytes:
    # Who interrupts waits for no more than a request to be closed.
    queued = generation.queued if generation.prompt.on_busy == "queue" else None
    return encode(
        Start(
            id=generation.id,
            conversation=generation.conversation_id,
            model=generation.model,
            queued=queued,
            prompt=generation.prompt.prompt if shown else None,
        )
    )


def _id_of(frame: object) -> str | None:
    """Return the ``id`` that a frame carries, or the ``conversation`` that it is about."""
    found = getattr(frame, "id", None) or getattr(frame, "conversation", None)
    return found if isinstance(found, str) else None


def _beginning(turn: Turn, room: int) -> Turn:
    text = turn.text[: max(0, room - _size(turn.prompt)) // ESCAPED]
    return replace(turn, text=text, partial=turn.partial or "cut")


def _messages(turn: Turn) -> list[HistoryMessage]:
    messages = [HistoryMessage(role="user", content=turn.prompt, id=turn.id)]
    if turn.text or turn.partial:
        messages.append(
            HistoryMessage(
                role="assistant",
                content=turn.text,
                id=turn.id,
                partial=turn.partial,
            )
        )
    return messages


def _size(text: str) -> int:
    return len(encode_basestring(text).encode())
