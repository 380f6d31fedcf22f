"""One client: frames in, to the hub; logs, out as frames.

It sees a small transport and not a library, so that it can be tested without sockets and serve
over another one. Text is written in the call that appends it, if the client can take it. A stop is
obeyed in the call that brings it; what needs the store waits for it in a queue of its own.
"""

import asyncio
import functools
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.admission import Visitor
from wsserver.errors import Code, Refused, StoreError
from wsserver.generation import State, well_formed
from wsserver.hub import Hub
from wsserver.limits import Account, Bucket, held
from wsserver.live import Conversation, Generation
from wsserver.logs import log
from wsserver.pages import conversations, history, room_of
from wsserver.protocol import (
    Auth,
    Authenticated,
    ClientFrame,
    Close,
    CloseConversation,
    Closed,
    Conversations,
    Delete,
    Deleted,
    Error,
    Hello,
    History,
    Limits,
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
    Stopped,
    encode,
    first_request,
    parse,
    parts,
)
from wsserver.settings import Settings
from wsserver.stopping import Stopping

__all__ = ["Connection", "Transport"]

REQUESTS = 32  # frames of one client that wait for an answer; the client gets `limit` for more
OPEN_CONVERSATIONS = 64  # of one socket: more than a person has tabs, and each costs memory
AUTH_PARTS = 64  # of a frame that is parsed before `auth`, see `parts`; an `auth` has about ten
LONGEST_STOP = 256  # bytes: a longer frame is no `stop`, and is not parsed over the frame rate


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


Request = Auth | Prompt | Resume | Open | List | Rename | Delete | CloseConversation


@dataclass(eq=False, slots=True)
class _Waiting:
    """What waits for its answer: a request, or the refusal of a frame that is unusable.

    ``stops``: the client has sent them after the prompt, before the server accepted it. ``size`` is
    what the message takes in memory, and ``account`` whose memory that is.
    """

    request: Request | Refused
    account: Account = ()
    size: int = 0
    stops: list[Stopping] = field(default_factory=list)


class _Cursor:
    """Where one client is in one generation's log. A follower of that log.

    Attributes:
        own: this socket sent the prompt.
        asked: this socket asked for the generation by ``prompt`` or ``resume``, and goes on with
            it when it closes the conversation.
        start: makes the ``start`` frame, which is written before all else.
        seq: the seq of the last piece that was written.
        limit: characters that a frame may merge.
    """

    __slots__ = ("_connection", "asked", "generation", "limit", "own", "seq", "start")

    def __init__(self, connection: "Connection", generation: Generation) -> None:
        self._connection = connection
        self.generation = generation
        self.own = False
        self.asked = False
        self.start: Callable[[], bytes] | None = None
        self.seq = 0
        self.limit = connection.settings.frame_size

    def wake(self) -> None:
        """Write all that is new, for as long as the client takes it."""
        connection, generation = self._connection, self.generation
        transport, log = connection.transport, generation.log
        while transport.writable:
            if self.start is not None:
                start, self.start = self.start, None
                transport.write(start())
            elif self.seq < log.seq:
                run, frame = generation.frame(self.seq, self.limit)
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

    def greet(self) -> None:
        """Tell a client of this protocol the limits, and whether it has to send ``auth``."""
        settings, principal = self.settings, self._visitor.principal
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
        name = None if principal is None else well_formed(principal.name)
        self.transport.write(
            encode(Hello(auth=True if principal is None else None, principal=name, limits=limits))
        )

    def receive(self, message: str | bytes) -> None:
        """Answer one message, now or when the store has told what is needed for it."""
        if self._ended:
            return
        self.frames += 1
        now = self._loop.time()
        frame, wait = None, self._bucket.take(now)
        stranger = self.principal is None and not self._authenticating
        try:
            frame = self._parse(message, stranger, wait)
            self._take(frame, wait, held(message))
            # A ping between unusable frames excuses none of them, nor does what a stranger sends.
            if not (stranger or isinstance(frame, Ping)):
                self._wasted = 0
        except Refused as refused:
            if frame is not None:
                _name(refused, frame)
            elif isinstance(message, str):
                refused.request = refused.request or first_request(message)
            if frame is None or wait:
                self._wasted += 1
            # In order: an error does not overtake the answers to the frames before.
            if self._waiting and len(self._waiting) < REQUESTS:
                self._waiting.append(_Waiting(refused.bare()))
            else:
                self._refuse(refused, frame)
        if not isinstance(frame, Ping):
            self.heard = now
        if self._wasted >= self.settings.bad_frames:
            self._end(Close.POLICY_VIOLATION, "too many unusable frames")

    def _parse(self, message: str | bytes, stranger: bool, wait: float) -> ClientFrame:  # noqa: FBT001
        """Parse a frame, unless its size alone tells how it is answered."""
        if wait and len(message) > LONGEST_STOP:
            raise Refused(Code.LIMIT, "Too many frames at once.", retry_after=wait)
        if isinstance(message, bytes):
            raise Refused(Code.INVALID_FRAME, "Send JSON as text frames, not binary ones.")
        if stranger and parts(message) > AUTH_PARTS:
            self._owner  # noqa: B018  # which refuses
        return parse(message)

    def _take(self, frame: ClientFrame, wait: float, size: int) -> None:
        """Answer a frame, or queue it.

        Args:
            frame: which.
            wait: the seconds by which it is over the frame rate.
            size: bytes that its message takes in memory.
        """
        if isinstance(frame, Stop):
            if self.principal is None and not self._authenticating:
                self._owner  # noqa: B018  # which refuses
            self._stop(frame, wait)
        elif wait:
            raise Refused(Code.LIMIT, "Too many frames at once.", retry_after=wait)
        elif isinstance(frame, Ping):
            self.transport.write(encode(Pong(request=frame.request)))
        else:
            self._queue(frame, size)

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

    @property
    def _authenticating(self) -> bool:
        """Whether an ``auth`` frame waits for its answer."""
        return any(isinstance(waiting.request, Auth) for waiting in self._waiting)

    async def _authenticate(self, auth: Auth) -> None:
        principal = await self._visitor.authenticate(auth.token)
        self._set_expiry()
        expires = principal.expires
        left = None if expires is None else round(max(0.0, expires - time.time()), 3)
        self.transport.write(
            encode(
                Authenticated(
                    principal=well_formed(principal.name),
                    expires=expires,
                    expires_in=left,
                    request=auth.request,
                )
            )
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
        self._free_worker()
        # The first to be served now is the last next time, so that none waits for ever.
        for generation, cursor in tuple(self._cursors.items()):
            if not self.transport.writable:
                return
            log = generation.log
            if cursor.start or cursor.seq < log.seq or log.terminal is not None:
                del self._cursors[generation]
                self._cursors[generation] = cursor
                cursor.wake()

    def _free_worker(self) -> None:
        """Let the worker go on that waits for the client to read."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def attach(self, generation: Generation) -> None:
        """Follow what somebody else has asked in a conversation that is open here."""
        self._follow(generation, shown=True)

    def renamed(self, conversation: Conversation, title: str) -> None:
        """Tell the title that somebody else has given a conversation which is open here."""
        self.transport.write(encode(Renamed(conversation=conversation.id, title=title)))

    def drop(self, conversation: Conversation) -> None:
        """Tell that somebody else has deleted a conversation which is open here."""
        self._forget(conversation.id)
        self.transport.write(encode(Deleted(conversation=conversation.id)))

    def leave(self, cursor: _Cursor, *, lost: bool = False) -> None:
        """Follow a generation no more; ``lost``: the connection died."""
        del self._cursors[cursor.generation]
        self._hub.unfollow(cursor.generation, cursor, lost=lost)
        self._check_idle()

    def detach(self, *, lost: bool = False) -> None:
        """The client is gone: leave all that it followed, and drop what it still asked for.

        A rename or delete is seen through: the client has asked for a change, not for an answer.

        Args:
            lost: the connection died, and the client may not know yet.
        """
        self._gone = True
        if self._expiry is not None:
            self._expiry.cancel()
        self._drop_requests()
        self._free_worker()
        if self._worker is not None:
            self._hub.see_through(self._worker)
        for conversation in self._watched:
            conversation.watchers.discard(self)
        self._watched.clear()
        for cursor in tuple(self._cursors.values()):
            self.leave(cursor, lost=lost)
        self._check_idle()

    def _drop_requests(self) -> None:
        """Forget the requests of the client that change nothing."""
        lasting = [w for w in self._waiting if isinstance(w.request, Rename | Delete)]
        if self._worker is not None and not (lasting and lasting[0] is self._waiting[0]):
            self._worker.cancel()
            self._worker = self._loop.create_task(self._work()) if lasting else None
        for waiting in self._waiting:
            if waiting not in lasting:
                self._hub.memory.give(waiting.account, waiting.size)
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

    def _queue(self, request: Request, size: int) -> None:
        if len(self._waiting) >= REQUESTS:
            raise Refused(Code.LIMIT, "Too many requests of this socket wait.")
        account = self._visitor.account
        if not self._hub.memory.take(account, size):
            raise Refused(Code.LIMIT, "Too many bytes of requests wait.")
        self._waiting.append(_Waiting(request, account, size))
        if self._worker is None:
            self._worker = self._loop.create_task(self._work())

    async def _work(self) -> None:
        """Answer what waits, in order, so that a client may rely on it."""
        try:
            while self._waiting:
                waiting = self._waiting[0]
                # A client that asks for much and reads little gets the next answer when it has.
                while not (self.transport.writable or self._gone):
                    self._writable = self._loop.create_future()
                    await self._writable
                try:
                    await self._answer(waiting)
                except Exception as error:  # noqa: BLE001
                    refused = self._fail(waiting, error)
                    if isinstance(waiting.request, Auth) and self.principal is None:
                        self._turn_away(refused)
                        return
                finally:
                    for stop in waiting.stops:
                        stop.settle()
                self._waiting.pop(0)
                self._hub.memory.give(waiting.account, waiting.size)
        finally:
            if self._worker is asyncio.current_task():  # and not dropped for another
                self._worker = None
            self._check_idle()

    def _fail(self, waiting: _Waiting, error: Exception) -> Refused:
        """Send the error for a request, and return it."""
        request = waiting.request
        frame = None if isinstance(request, Refused) else request
        if isinstance(error, Refused):
            refused, cause = error, None
        else:
            known = isinstance(error, StoreError)
            refused, cause = Refused(Code.STORE if known else Code.INTERNAL), error
        if frame is not None:
            _name(refused, frame)
        self._refuse(refused, frame, cause)
        return refused

    def _turn_away(self, refused: Refused) -> None:
        """Close on one that could not say who it is; it may guess again in a new connection."""
        later = refused.retryable
        self._end(Close.TRY_AGAIN_LATER if later else Close.POLICY_VIOLATION, refused.code)

    async def _answer(self, waiting: _Waiting) -> None:
        match waiting.request:
            case Refused() as refused:
                raise refused
            case Auth() as auth:
                await self._authenticate(auth)
            case Prompt() as prompt:
                generation = await self._prompt(prompt)
                for stop in waiting.stops:
                    self._stop_generation(generation, stop)
            case Resume() as resume:
                await self._resume(resume)
            case Open() as request:
                self._hub.accounts.check_reads(self._visitor.account)
                await self._open(request)
            case CloseConversation() as request:
                self._close(request)
            case List() as request:
                self._hub.accounts.check_reads(self._visitor.account)
                await self._list(request)
            case Rename(conversation=name, title=title, request=request):
                await self._hub.conversations.rename(name, self._owner, title, self)
                answer = Renamed(conversation=name, title=title, request=request)
                self.transport.write(encode(answer))
            case Delete(conversation=name, request=request):
                await self._hub.delete(name, self._owner, self)
                self._forget(name)
                self.transport.write(encode(Deleted(conversation=name, request=request)))

    async def _prompt(self, prompt: Prompt) -> Generation:
        owner, request = self._owner, prompt.request
        if request is not None:  # the same prompt may be sent again as another request
            prompt = prompt.model_copy(update={"request": None})
        known = self._hub.known(owner, prompt.id) is not None
        if not known and self._active(prompt) >= self.settings.generations_per_socket:
            raise Refused(Code.LIMIT, "This socket runs as many generations as it may.")
        generation = await self._hub.prompt(prompt, owner, self._visitor.account, self._own, self)
        if prompt.conversation is None and generation.conversation_id is not None:
            self._own = generation.conversation_id
        # After each `start` comes everything, so that a client need not know what it has had.
        self._follow(generation, own=True, request=request)
        return generation

    async def _resume(self, resume: Resume) -> None:
        generation = await self._hub.find(self._owner, resume.id, self._visitor.account)
        if generation is None:
            raise Refused(Code.NOT_FOUND)
        if resume.after > generation.log.seq:
            raise Refused(Code.GAP)
        limit = generation.resume(resume.after, self.settings.frame_size)
        self._follow(
            generation, after=resume.after, limit=limit, asked=True, request=resume.request
        )

    def _write_read(self, answer: History | Conversations) -> None:
        """Write an answer from the store, which the account pays for by its size."""
        frame = encode(answer)
        self._hub.accounts.charge_reads(self._visitor.account, len(frame))
        self.transport.write(frame)

    async def _open(self, request: Open) -> None:
        follow = request.before is None
        async with self._hub.conversations.hold(request.conversation, self._owner) as conversation:
            full = len(self._watched) >= OPEN_CONVERSATIONS and conversation not in self._watched
            if follow and full:
                message = f"This socket has {OPEN_CONVERSATIONS} conversations open; close one."
                raise Refused(Code.LIMIT, message)
            room = room_of(self.settings)
            stored = await self._hub.conversations.history(conversation, request.before, room)
            live = [generation.id for generation in conversation.live]
            self._write_read(history(stored, live, room, request.request))
            if follow and not self._gone:
                self._own = conversation.id
                self._watched[conversation] = None
                conversation.watchers.add(self)
                for generation in conversation.live:
                    if generation not in self._cursors:
                        self._follow(generation, shown=True)

    def _close(self, request: CloseConversation) -> None:
        """Undo `open`. Closing a conversation that is not open does nothing."""
        name, _ = request.conversation, self._owner
        for conversation in self._forget(name):
            conversation.watchers.discard(self)
            for cursor in tuple(self._cursors.values()):
                if cursor.generation.conversation is conversation and not cursor.asked:
                    self.leave(cursor)
        self.transport.write(encode(Closed(conversation=name, request=request.request)))

    def _forget(self, name: str) -> list[Conversation]:
        """Forget that a conversation is open; return it. Its terminals are still to be written."""
        found = [conversation for conversation in self._watched if conversation.id == name]
        for conversation in found:
            del self._watched[conversation]
        if self._own == name:
            self._own = None
        return found

    async def _list(self, request: List) -> None:
        before = None
        if request.before is not None:
            if not re.fullmatch("[0-9]{1,18}", request.before, re.ASCII):
                raise Refused(Code.INVALID_FRAME, "before: must be the `next` of a page.")
            before = int(request.before)
        found = await self._hub.conversations.recent(self._owner, request.limit + 1, before)
        page = conversations(found, request.limit, room_of(self.settings), request.request)
        self._write_read(page)

    # Following and stopping.

    def _follow(
        self,
        generation: Generation,
        after: int = 0,
        *,
        limit: int | None = None,
        own: bool = False,
        asked: bool = False,
        shown: bool = False,
        request: str | None = None,
    ) -> None:
        """Write the ``start`` of a generation, and follow it from a piece on.

        Args:
            generation: which.
            after: the seq of the last piece that the client has.
            limit: characters that a frame may merge; None for those of the settings.
            own: this socket sent the prompt, which counts as one of its generations.
            asked: this socket asked for the generation by its id.
            shown: the client does not know the prompt yet.
            request: the ``request`` of the frame that the ``start`` answers.
        """
        cursor = self._cursors.get(generation)
        if cursor is None:
            cursor = self._cursors[generation] = _Cursor(self, generation)
            self._hub.follow(generation, cursor)
        cursor.own = cursor.own or own
        cursor.asked = cursor.asked or own or asked
        if cursor.start is not None:  # the answer to a frame before, which had to wait
            self.transport.write(cursor.start())
        cursor.start = functools.partial(
            _start, generation, after=after, shown=shown, request=request
        )
        cursor.seq = after
        cursor.limit = limit or self.settings.frame_size
        cursor.wake()

    def _stop(self, stop: Stop, wait: float) -> None:
        """Stop what a frame names. The answer comes when all of it has ended.

        Raises:
            Refused: there is nothing to stop.
        """
        prompts = [
            waiting
            for waiting in self._waiting
            if isinstance(waiting.request, Prompt)
            and stop.id in {None, waiting.request.id}
            and not (wait and waiting.stops)  # nor may a flood pile up for one prompt
        ]
        if stop.id is None:
            # Those that wait first: else they would begin as the one before them ends.
            targets = sorted(self._cursors, key=lambda g: g.state is not State.QUEUED)
        else:
            owner = self.principal
            known = None if owner is None else self._hub.known(owner, stop.id)
            targets = [] if known is None else [known]
        # A flood of stops may not make one follower each of a generation that is being stopped.
        settled = {State.STOPPING, State.SAVING, State.ENDED} if wait else {State.ENDED}
        running = [generation for generation in targets if generation.state not in settled]
        if not (prompts or running):
            raise Refused(Code.NOT_RUNNING)
        stopping = Stopping(stop, self._stopped)
        for waiting in prompts:
            stopping.expect()
            waiting.stops.append(stopping)
        for generation in running:
            self._stop_generation(generation, stopping)
        stopping.settle()

    def _stop_generation(self, generation: Generation, stopping: Stopping) -> None:
        if generation.state is not State.ENDED:
            stopping.follow(generation)
            self._hub.stop(generation, "client")

    def _stopped(self, stop: Stop, ids: list[str]) -> None:
        """Answer a ``stop``: all that it stopped has ended, or was never accepted."""
        if self._gone or self._ended:
            return
        if not ids:
            refused = Refused(Code.NOT_RUNNING)
            _name(refused, stop)
            self._refuse(refused, stop)
        elif stop.request is not None:
            self.transport.write(encode(Stopped(ids=ids, request=stop.request)))

    def _active(self, prompt: Prompt) -> int:
        """Count what was started here and runs or waits, without what the prompt would replace."""
        name = prompt.conversation or self._own
        replaced = name if prompt.on_busy == "interrupt" and prompt.messages is None else None
        return sum(
            cursor.own
            and generation.state in {State.QUEUED, State.RUNNING}
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
                    request=refused.request,
                    retryable=refused.retryable,
                    retry_after=refused.retry_after,
                    ref=ref,
                )
            )
        )


def _start(
    generation: Generation, *, after: int = 0, shown: bool = False, request: str | None = None
) -> bytes:
    # A prompt that interrupts waits for no more than a request to be closed.
    queued = generation.queued if generation.prompt.on_busy == "queue" else None
    return encode(
        Start(
            id=generation.id,
            conversation=generation.conversation_id,
            model=generation.model,
            queued=queued,
            after=after or None,
            prompt=generation.prompt.prompt if shown else None,
            retry_of=generation.prompt.retry_of if shown else None,
            request=request,
        )
    )


def _name(refused: Refused, frame: ClientFrame) -> None:
    """Have a refusal name the frame that it is about."""
    about = getattr(frame, "id", None) or getattr(frame, "conversation", None)
    refused.about = refused.about or about
    refused.request = refused.request or frame.request
