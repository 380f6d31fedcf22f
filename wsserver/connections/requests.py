"""The queue of one client's requests that need the store. They are answered in order.

The read loop does not await them. A client may rely on the order of the answers.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.connections.following import Following
from wsserver.connections.histories import conversations, history, room_of
from wsserver.connections.session import Session
from wsserver.connections.stopping import Stopping
from wsserver.encoding import encode
from wsserver.errors import Code, Refused
from wsserver.hub.live import Generation
from wsserver.limits import Account
from wsserver.protocol import (
    Auth,
    Authenticated,
    CloseConversation,
    Closed,
    Conversations,
    Delete,
    Deleted,
    History,
    List,
    Open,
    Prompt,
    Rename,
    Renamed,
    Resume,
)
from wsserver.text import well_formed

REQUESTS = 32  # frames of one client that wait for an answer; the client gets `limit` for more

QueuedFrame = Auth | Prompt | Resume | Open | List | Rename | Delete | CloseConversation


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits for its answer, or the refusal of an unusable frame.

    ``account`` pays for the ``size`` bytes of the message. ``stops`` are the stops that wait for
    the prompt: they take effect when it is accepted.
    """

    request: QueuedFrame | Refused
    account: Account = ()
    size: int = 0
    stops: list[Stopping] = field(default_factory=list)


class Authenticating(Protocol):
    """The connection, which is notified of the result of an ``auth``."""

    def authenticated(self) -> None:
        """An ``auth`` was accepted."""
        ...

    def not_authenticated(self, refused: Refused) -> None:
        """An ``auth`` failed, and the client has not authenticated before."""
        ...


@dataclass(eq=False, slots=True)
class Requests:
    """Queues the requests of one client, and answers them one after the other."""

    _session: Session
    _following: Following
    _connection: Authenticating
    # The first one is being answered. An empty tuple takes no memory.
    _waiting: tuple[Waiting, ...] = ()
    _worker: asyncio.Task[None] | None = None  # answers them; None while none waits
    _writable: asyncio.Future[None] | None = None  # done when the client reads again
    _done: asyncio.Future[None] | None = None  # done when none waits

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def authenticating(self) -> bool:
        """Whether an ``auth`` frame waits for its answer."""
        return any(isinstance(waiting.request, Auth) for waiting in self._waiting)

    def prompts(self, name: str | None) -> list[Waiting]:
        """Return the waiting prompts with an id; all waiting prompts if ``name`` is None."""
        return [
            waiting
            for waiting in self._waiting
            if isinstance(waiting.request, Prompt) and name in {None, waiting.request.id}
        ]

    # The queue.

    def put(self, request: QueuedFrame, size: int) -> None:
        """Queue a request with a message of ``size`` bytes, unless it is answered at once.

        Raises:
            Refused: too many requests or bytes wait.
        """
        idle = not self._waiting and self._session.transport.writable
        if idle and isinstance(request, Prompt) and self._prompt_now(request):
            return
        if len(self._waiting) >= REQUESTS:
            raise Refused(Code.LIMIT, "Too many of your requests wait. Try again in a moment.")
        account = self._session.account
        if not self._session.hub.memory.acquire(account, size):
            raise Refused(Code.LIMIT, "Your waiting requests are too large. Try again in a moment.")
        self._waiting += (Waiting(request, account, size),)
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    def put_refused(self, refused: Refused) -> bool:
        """Queue the error for an unusable frame behind the answers to earlier frames.

        Returns:
            False if there are none, or too many: the error can be sent at once.
        """
        if not self._waiting or len(self._waiting) >= REQUESTS:
            return False
        self._waiting += (Waiting(refused.bare()),)
        return True

    def wake(self) -> None:
        """Continue with the answers: the client reads again."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def drop(self) -> None:
        """Drop the requests, except renames and deletes.

        A rename or delete continues, because it changes something even without an answer.
        """
        lasting = tuple(w for w in self._waiting if isinstance(w.request, Rename | Delete))
        if self._worker is not None and not (lasting and lasting[0] is self._waiting[0]):
            self._worker.cancel()
            loop = asyncio.get_running_loop()
            self._worker = loop.create_task(self._work()) if lasting else None
        for waiting in self._waiting:
            if waiting not in lasting:
                self._session.hub.memory.release(waiting.account, waiting.size)
        self._waiting = lasting
        self.wake()
        self._check_done()

    def detach(self) -> None:
        """The client has disconnected: let the hub wait for the remaining requests."""
        self.drop()
        if self._worker is not None:
            self._session.hub.wait_at_close(self._worker)

    async def wait_done(self) -> None:
        """Wait until no request waits."""
        if self._waiting:
            self._done = asyncio.get_running_loop().create_future()
            await self._done

    def _check_done(self) -> None:
        if not self._waiting and self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def _work(self) -> None:
        """Answer the waiting requests in order."""
        session, worker = self._session, asyncio.current_task()
        try:
            while self._waiting and self._worker is worker:
                waiting = self._waiting[0]
                # A client that does not read gets its next answer when it reads again.
                while not (session.transport.writable or session.ended):
                    self._writable = asyncio.get_running_loop().create_future()
                    await self._writable
                try:
                    await self._answer(waiting)
                finally:
                    for stop in waiting.stops:
                        stop.complete_one()
                if waiting in self._waiting:  # it was not dropped during the await
                    self._waiting = self._waiting[1:]
                    self._session.hub.memory.release(waiting.account, waiting.size)
        finally:
            if self._worker is worker:  # and not dropped for another
                self._worker = None
            self._check_done()

    # The answers.

    async def _answer(self, waiting: Waiting) -> None:
        """Answer a request, or send its error."""
        request = waiting.request
        if isinstance(request, Refused):
            self._session.refuse(request, None)
            return
        try:
            if isinstance(request, Prompt):
                generation = await self._prompt(request)
                for stopping in waiting.stops:
                    stopping.stop(generation)
            else:
                await self._do(request)
        except Exception as error:  # noqa: BLE001
            refused = self._session.fail(error, request)
            if isinstance(request, Auth) and self._session.visitor.principal is None:
                self._connection.not_authenticated(refused)

    async def _do(
        self, request: Auth | Resume | Open | List | Rename | Delete | CloseConversation
    ) -> None:
        session, hub = self._session, self._session.hub
        match request:
            case Auth():
                await self._authenticate(request)
            case Resume():
                await self._resume(request)
            case Open():
                await self._open(request)
            case CloseConversation():
                session.check_authenticated()
                self._following.close(request.conversation)
                session.write(Closed(conversation=request.conversation, request=request.request))
            case List():
                await self._list(request)
            case Rename():
                await self._rename(request)
            case Delete(conversation=name):
                await hub.delete(session.owner, name, self._following)
                self._following.forget(name)
                session.write(Deleted(conversation=name, request=request.request))

    async def _authenticate(self, auth: Auth) -> None:
        principal = await self._session.visitor.authenticate(auth.token)
        self._connection.authenticated()
        expires = principal.expires
        left = None if expires is None else round(max(0.0, expires - time.time()), 3)
        self._session.write(
            Authenticated(
                principal=well_formed(principal.name),
                models=self._session.hub.scheduler.models,
                expires=expires,
                expires_in=left,
                request=auth.request,
            )
        )

    async def _prompt(self, prompt: Prompt) -> Generation:
        session, following = self._session, self._following
        self._check_prompt(prompt)
        generation = await session.hub.scheduler.accept(
            prompt.bare(), session.owner, session.account, following.own, following
        )
        self._follow(prompt, generation)
        return generation

    def _prompt_now(self, prompt: Prompt) -> bool:
        """Answer a prompt at once, or return False: the store has to be read first."""
        session, following = self._session, self._following
        try:
            self._check_prompt(prompt)
            generation = session.hub.scheduler.accept_now(
                prompt.bare(), session.owner, session.account, following.own, following
            )
            if generation is not None:
                self._follow(prompt, generation)
        except Exception as error:  # noqa: BLE001
            session.fail(error, prompt)
            return True
        return generation is not None

    def _check_prompt(self, prompt: Prompt) -> None:
        session, following = self._session, self._following
        known = session.hub.known(session.owner, prompt.id) is not None
        if not known and following.active(prompt) >= session.settings.generations_per_socket:
            raise Refused(
                Code.LIMIT,
                "You already have your maximum number of replies here. Wait for the end of one.",
            )

    def _follow(self, prompt: Prompt, generation: Generation) -> None:
        """Follow the generation of a prompt, from the first piece on."""
        if prompt.conversation is None and generation.conversation_id is not None:
            self._following.own = generation.conversation_id
        self._following.follow(generation, own=True, request=prompt.request)

    async def _resume(self, resume: Resume) -> None:
        session = self._session
        generation, limit = await session.hub.resume(
            session.owner, resume.id, resume.after, session.account
        )
        self._following.follow(
            generation, after=resume.after, limit=limit, asked=True, request=resume.request
        )

    async def _open(self, request: Open) -> None:
        session, hub = self._session, self._session.hub
        hub.accounts.check_reads(session.account)
        async with hub.conversations.pin(session.owner, request.conversation) as conversation:
            if request.before is None:
                self._following.check_open(conversation)
            room = room_of(session.settings)
            if request.size is not None:
                room = min(room, request.size)
            if hub.elsewhere is not None and request.before is None:
                await hub.elsewhere.watch(conversation)
            stored = await hub.conversations.history(conversation, request.before, room)
            live = [generation.id for generation in conversation.live]
            self._write_read(history(stored, live, room, request.request))
            if request.before is None and not session.ended:
                self._following.open(conversation)

    async def _list(self, request: List) -> None:
        session, hub = self._session, self._session.hub
        hub.accounts.check_reads(session.account)
        before = None
        if request.before is not None:
            if not re.fullmatch("[0-9]{1,18}", request.before, re.ASCII):
                raise Refused(Code.INVALID_FRAME, "before: must be the `next` of a page.")
            before = int(request.before)
        found = await hub.conversations.recent(session.owner, request.limit + 1, before)
        room = room_of(session.settings)
        self._write_read(conversations(found, request.limit, room, request.request))

    async def _rename(self, request: Rename) -> None:
        """Change the title of a conversation. The account pays for the frames to all watchers."""
        session, hub = self._session, self._session.hub
        hub.accounts.check_reads(session.account)
        name, title = request.conversation, request.title
        notified = await hub.conversations.rename(session.owner, name, title, self._following)
        frame = encode(Renamed(conversation=name, title=title, request=request.request))
        hub.accounts.charge_reads(session.account, (1 + notified) * len(frame))
        session.transport.write(frame)

    def _write_read(self, answer: History | Conversations) -> None:
        """Write an answer from the store. The account pays for its bytes."""
        frame = encode(answer)
        self._session.hub.accounts.charge_reads(self._session.account, len(frame))
        self._session.transport.write(frame)
