"""The live generations of this process: start, stop, follow, grace, retention.

What a client asks for is decided at once and without waiting, when what has to be known for it has
been read from the store. Only the models run in tasks, one per generation.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import secrets
from collections import deque

from wsserver.context import less_than, messages_of
from wsserver.conversations import Conversations
from wsserver.errors import OUTAGE, TOO_LONG, UPSTREAM, Code, ModelError, Refused
from wsserver.generation import End, Follower, State, tokens_in
from wsserver.intake import Intake
from wsserver.journal import Journal
from wsserver.limits import CACHE, SECONDS_PER_DAY, Account, Memory, Rates, Shares, held
from wsserver.live import (
    Conversation,
    FirstPiece,
    Generation,
    Outcome,
    Watcher,
    restored,
)
from wsserver.logs import log as events
from wsserver.models.base import (
    Message,
    Model,
    PushModel,
    Request,
    declared_name,
    name_of,
    provider_of,
)
from wsserver.protocol import Done, Error, Prompt, StoppedBy, Terminal
from wsserver.quota import Quota
from wsserver.settings import Settings
from wsserver.spending import Spending
from wsserver.stores.base import Forgotten, Header, Store
from wsserver.telemetry import Metrics, Span, span
from wsserver.upkeep import Upkeep

__all__ = ["Hub"]

READ_RATE = 2**20  # bytes/s of histories and lists that one account gets in the long run
READ_BURST = 2**24  # bytes of them at once: more than a window full of tabs asks for
KEPT_PER_REPLY = 4096  # bytes of an ended reply besides its text
POINTER = 8  # bytes of a place in a list
SHORTER = 4  # attempts with ever less of a conversation, before the prompt alone is tried
TAKEN_BACK = frozenset({"client", "deleted", "disconnect", "replaced"})  # who stopped the prompt
UNAWARE = 15.0  # seconds in which a client notices that its connection is dead, and connects again
FAILURES = 5  # of the model's API in a row, after which it is said to fail
FAILING = 30.0  # seconds since the last of them, after which it may be asked again


class Hub:
    """Runs a model for whoever asks, and lets anyone follow.

    Ids of generations and conversations are their owner's: to all others there are none.

    Args:
        model: what answers.
        store: where conversations last.
        settings: the limits and times that hold here.
        metrics: what learns what happens here.
        memory: what counts the bytes that are held here for clients.
    """

    def __init__(
        self,
        model: Model | PushModel,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        memory: Memory,
    ) -> None:
        self.memory = memory
        memory.shed_by(self._shed)
        self.model_name = name_of(model)
        self._declared_name = declared_name(model)
        self.metrics = metrics
        self._provider = provider_of(model)
        self._model = model
        self._store = store
        self._settings = settings
        self._journal = Journal(
            store,
            settings.save_interval,
            settings.store_timeout,
            metrics=metrics,
        )
        self._upkeep = Upkeep(
            store,
            self.delete,
            replay=settings.replay,
            retention=settings.retention_days * SECONDS_PER_DAY,
        )
        self.conversations = Conversations(store, self._journal, settings, memory)
        self._loop = asyncio.get_running_loop()
        self.reads = Rates(READ_RATE, READ_BURST)  # bytes of histories and lists, by account
        self._rates = Rates(settings.prompts_per_minute / 60, settings.prompts_per_minute)
        self._shares = Shares(settings.generations_per_principal)
        self._spending = Spending(settings, store)
        self._quota = Quota(store, settings)
        self._generations: dict[tuple[str, str], Generation] = {}  # by owner and id
        self._live: set[Generation] = set()
        self._tasks: set[asyncio.Task[End]] = set()
        self._errands: set[asyncio.Task[None]] = set()  # requests of clients that have gone
        self._ended: deque[tuple[float, Generation]] = deque()
        self._ended_size = 0
        self._sweep: asyncio.TimerHandle | None = None
        self._upstream_failures = 0  # in a row
        self._upstream_failed = 0.0  # when the last of them was
        self._deletions = 0  # of conversations, so far
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """How many generations are queued, running or being stopped."""
        return len(self._live)

    @property
    def running(self) -> list[Generation]:
        """The generations whose model has been asked and has not closed its request."""
        asked = {State.RUNNING, State.STOPPING}
        return [generation for generation in self._live if generation.state in asked]

    @property
    def upstream_failing(self) -> bool:
        """Whether the model's API has failed just now, and several times in a row.

        That alone does not last: a server that gets no prompts any more would never recover.
        """
        recently = self._loop.time() - self._upstream_failed < FAILING
        return self._upstream_failures >= FAILURES and recently

    async def probe(self) -> None:
        """Find out whether what is said here is saved.

        Raises:
            StoreError: it is not.
        """
        await self._journal.probe()

    def known(self, owner: str, generation_id: str | None) -> Generation | None:
        """Return the generation of that id, if it is in memory."""
        return None if generation_id is None else self._generations.get((owner, generation_id))

    def check_reads(self, account: Account) -> None:
        """Refuse to read the store for an account that has read more than it may.

        Raises:
            Refused: it has.
        """
        if wait := self.reads.owed(account, self._loop.time()):
            message = "You read more history than you may in so short a time."
            raise Refused(Code.LIMIT, message, retry_after=wait)

    async def find(self, owner: str, generation_id: str, account: Account) -> Generation | None:
        """Return the generation of that id, for as long as it is stored.

        The account pays for what is read from the store.

        Raises:
            Refused: the generation was deleted, its time is over, or the account has read more
                than it may.
            StoreError: the store cannot tell.
        """
        known = self.known(owner, generation_id)
        if known is not None:
            return known
        self.check_reads(account)
        deletions = -1
        while deletions != self._deletions:  # else a delete meanwhile would be undone here
            deletions = self._deletions
            stored = await self._store.find(generation_id, owner)
        known = self.known(owner, generation_id)  # somebody else may have been quicker
        if known is not None or stored is None:
            return known
        if isinstance(stored, Forgotten):
            raise Refused(Code.FORGOTTEN)
        known = self._generations[owner, generation_id] = restored(stored)
        self._retain(known)
        self.reads.charge(account, known.size, self._loop.time())
        return known

    async def prompt(
        self, prompt: Prompt, owner: str, account: Account, own: str | None, sender: Watcher
    ) -> Generation:
        """Accept a prompt: start a generation, queue it, or return the one that it already has.

        Args:
            prompt: what the client sent.
            owner: for whom.
            account: whose limits count.
            own: the id of the conversation that goes on where the prompt names none; None makes
                a new one.
            sender: who needs not be told of it, of those who watch the conversation.

        Raises:
            Refused: it cannot be accepted, and nothing has changed.
            StoreError: what it goes on from cannot be read.
        """
        self._check(prompt)
        known = await self._sent_before(prompt, owner, account)
        if known is not None:
            return known
        if self._draining:
            raise Refused(Code.SHUTTING_DOWN)
        async with contextlib.AsyncExitStack() as stack:
            conversation = None
            if prompt.messages is None:
                name = prompt.conversation or own
                conversation = await stack.enter_async_context(
                    self.conversations.hold(name or _new_id(), owner, load=name is not None)
                )
            new = conversation is not None and not conversation.exists
            await self._quota.check(owner, new=new)
            await self._spending.learn(owner)
            # Nothing is awaited from here on. What the awaits above may have changed is checked
            # again: the same prompt, a delete, a drain.
            known = self._same(prompt, self.known(owner, prompt.id))
            if known is not None:
                return known
            return self._accept(prompt, owner, account, conversation, sender)

    async def _sent_before(self, prompt: Prompt, owner: str, account: Account) -> Generation | None:
        """Return the generation of a prompt that is sent again under its id."""
        if prompt.id is None:
            return None
        return self._same(prompt, await self.find(owner, prompt.id, account))

    @staticmethod
    def _same(prompt: Prompt, known: Generation | None) -> Generation | None:
        """Return the generation that is known under the prompt's id.

        Raises:
            Refused: the generation belongs to another prompt.
        """
        if known is not None and known.prompt != prompt:
            raise Refused(Code.ID_CONFLICT)
        return known

    def stop(self, generation: Generation, why: StoppedBy | ModelError) -> None:
        """Stop a generation; its terminal follows once the request to the model is closed.

        Stopping what is being stopped or has ended does nothing.

        Args:
            generation: which.
            why: who stops it, for ``done``; or what has failed, for ``error``.
        """
        now = self._loop.time()
        if generation.state is State.QUEUED:
            generation.stop(why, now)
            assert generation.conversation is not None
            generation.conversation.queue.remove(generation)
            self._save(generation, why)
        elif generation.state is State.RUNNING:
            assert generation.task is not None
            if generation.task.cancel():
                generation.stop(why, now)
                _cancel(generation.watch)
                generation.watch = self._loop.call_later(
                    self._settings.stop_timeout, self._abandon, generation
                )
            else:  # the model has just ended its answer
                self._finished(generation, generation.task)

    def follow(self, generation: Generation, follower: Follower) -> None:
        """Have the follower woken from now on, and the generation go on for its sake."""
        generation.log.followers.append(follower)
        generation.readers += 1
        generation.unread = None
        _cancel(generation.grace)
        generation.grace = None

    def unfollow(self, generation: Generation, follower: Follower, *, lost: bool = False) -> None:
        """Wake the follower no more. If it was the last one, the grace time begins.

        Args:
            generation: which.
            follower: who.
            lost: the connection of the follower is dead, and the client may not know yet.
        """
        generation.log.followers.remove(follower)
        generation.readers -= 1
        if not generation.readers and generation.state is not State.ENDED:
            generation.unread = 0
            generation.unaware_until = self._loop.time() + UNAWARE if lost else 0.0
            generation.grace = self._loop.call_later(
                self._settings.grace, self.stop, generation, "disconnect"
            )

    async def delete(
        self,
        conversation_id: str,
        owner: str,
        sender: Watcher | None = None,
        *,
        before: float | None = None,
    ) -> None:
        """Stop what runs in a conversation, delete it, and tell those who watch it.

        Args:
            conversation_id: which.
            owner: whose.
            sender: who needs not be told.
            before: delete the conversation only if it was last used before this time, in seconds
                since the epoch.

        Raises:
            Refused: the owner has no such conversation, or it is in use.
            StoreError: it cannot be deleted.
        """
        async with self.conversations.hold(conversation_id, owner) as conversation:
            if before is not None and (conversation.live or conversation.holders > 1):
                raise Refused(Code.BUSY)
            conversation.deleted = True
            try:
                await self._delete(conversation, before)
            except BaseException:
                conversation.deleted = False
                raise
        for watcher in tuple(conversation.watchers):
            if watcher is not sender:
                watcher.drop(conversation)
        conversation.watchers.clear()
        for key, generation in list(self._generations.items()):
            within = generation.owner, generation.conversation_id
            if within == (owner, conversation_id) and generation not in self._live:
                del self._generations[key]

    async def _delete(self, conversation: Conversation, before: float | None) -> None:
        """Stop what runs in a conversation, wait for the models, and delete the conversation."""
        live = conversation.live
        for generation in reversed(live):
            self.stop(generation, "deleted")
        tasks = [generation.task for generation in live if generation.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.stop_timeout)
        await self._journal.flush()
        found = await self._store.delete(conversation.id, conversation.owner, before)
        if not found and (before is not None or not conversation.exists):
            raise Refused(Code.NOT_FOUND)
        self._deletions += 1
        self._journal.deleted(conversation.owner, conversation.id)
        self.conversations.forget(conversation)

    async def rename(self, conversation_id: str, owner: str, title: str, sender: Watcher) -> None:
        """Give a conversation another title, and tell those who watch the conversation.

        Args:
            conversation_id: which.
            owner: whose.
            title: the new title.
            sender: the watcher that needs not be told.

        Raises:
            Refused: the owner has no such conversation.
            StoreError: the title cannot be saved.
        """
        async with self.conversations.hold(conversation_id, owner) as conversation:
            await self._journal.flush()
            if not await self._store.rename(conversation_id, owner, title):
                raise Refused(Code.NOT_FOUND)
            for watcher in tuple(conversation.watchers):
                if watcher is not sender:
                    watcher.renamed(conversation, title)

    def see_through(self, task: "asyncio.Task[None]") -> None:
        """Keep a task whose client has gone, and wait for the task before the store is closed."""
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    # Ending all.

    async def drain(self) -> None:
        """Refuse prompts, stop those that wait, and let the rest finish within the drain time."""
        self._draining = True
        for generation in tuple(self._live):
            if generation.state is State.QUEUED:
                self.stop(generation, "shutdown")
        await self._until_idle(self._settings.drain_timeout)
        for generation in tuple(self._live):
            self.stop(generation, "shutdown")
        await self._until_idle(self._settings.stop_timeout)

    async def _until_idle(self, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._idle.wait()

    async def close(self, within: float) -> None:
        """Stop whatever still runs, and forget everything. Idempotent.

        Args:
            within: seconds that models get to close their requests.
        """
        self._draining = True
        for generation in tuple(self._live):
            self.stop(generation, "shutdown")
        if tasks := self._tasks | self._errands:
            await asyncio.wait(tasks, timeout=within)
        for task in self._errands:
            task.cancel()
        for generation in self._generations.values():
            _cancel(generation.watch)
            _cancel(generation.grace)
        _cancel(self._sweep)
        await self._upkeep.close()
        await self._journal.close(within)

    # Accepting a prompt.

    def _check(self, prompt: Prompt) -> None:
        settings = self._settings
        if (size := prompt.size) > settings.prompt_size:
            raise Refused(
                Code.TOO_LONG, f"The prompt has {size} bytes; {settings.prompt_size} are allowed."
            )
        if prompt.model not in {None, self.model_name, *settings.models}:
            raise Refused(Code.MODEL_NOT_ALLOWED)

    def _accept(
        self,
        prompt: Prompt,
        owner: str,
        account: Account,
        conversation: Conversation | None,
        sender: Watcher,
    ) -> Generation:
        if self._draining:
            raise Refused(Code.SHUTTING_DOWN)
        if conversation is not None:
            self._check_turn(prompt, conversation)
        allowance = self._allow(prompt, owner, account)
        generation = Generation(
            id=prompt.id or _new_id(),
            owner=owner,
            account=account,
            prompt=prompt,
            allowance=allowance,
            model=prompt.model or self.model_name,
            conversation_id=None if conversation is None else conversation.id,
            conversation=conversation,
            accepted=self._loop.time(),
        )
        generation.asked = _tokens_of(self._request(generation))
        price = self._spending.price(generation.model)
        generation.reserved = price.likely(generation.asked, allowance)
        self._shares.take(account)
        self._spending.reserve(owner, generation.reserved)
        self._generations[owner, generation.id] = generation
        self._live.add(generation)
        self._idle.clear()
        header = Header(
            generation.id,
            owner,
            generation.conversation_id,
            prompt,
            generation.model,
            retry_of=prompt.retry_of,
        )
        running = None if conversation is None else conversation.running
        generation.record = self._journal.begin(header, generation.log, waits=running is not None)
        if conversation is not None:
            conversation.exists = conversation.loaded = True
        if conversation is None or running is None:
            self._begin(generation)
        else:
            if prompt.on_busy == "interrupt":
                for waiting in tuple(conversation.queue):
                    self.stop(waiting, "replaced")
                self.stop(running, "replaced")
            conversation.queue.append(generation)
        if conversation is not None:
            for watcher in tuple(conversation.watchers):
                if watcher is not sender:
                    watcher.attach(generation)
        return generation

    def _check_turn(self, prompt: Prompt, conversation: Conversation) -> None:
        if conversation.deleted:
            raise Refused(Code.NOT_FOUND)
        if prompt.retry_of is not None and prompt.retry_of != conversation.last:
            raise Refused(Code.NOT_LAST)
        if conversation.busy and prompt.on_busy == "reject":
            raise Refused(Code.BUSY)
        full = len(conversation.queue) >= self._settings.queue_size
        if conversation.busy and prompt.on_busy == "queue" and full:
            raise Refused(Code.LIMIT, "The conversation's queue is full.")

    def _allow(self, prompt: Prompt, owner: str, account: Account) -> int:
        """Return how many output tokens a prompt gets.

        Raises:
            Refused: it must not run now.
        """
        settings = self._settings
        if self.live >= settings.generations:
            raise Refused(Code.LIMIT, "The server runs as many generations as it may.")
        if self._shares.full(account):
            raise Refused(Code.LIMIT, "You run as many generations as you may.")
        wanted = min(prompt.max_tokens or settings.max_tokens, settings.max_tokens_limit)
        allowance = self._spending.allow(owner, prompt.model or self.model_name, wanted)
        if wait := self._rates.take(account, self._loop.time()):
            raise Refused(Code.LIMIT, "Too many prompts a minute.", retry_after=wait)
        return allowance

    # Running a model.

    def _begin(self, generation: Generation) -> None:
        conversation, retried = generation.conversation, generation.prompt.retry_of
        if conversation is not None:
            conversation.running = generation
            if retried is not None:
                conversation.turns = [turn for turn in conversation.turns if turn.id != retried]
        request = self._request(generation)
        generation.log.followers.append(FirstPiece(generation, self._loop.time))
        trace = span(
            generation=generation.id,
            conversation=generation.conversation_id,
            provider=self._provider,
            model=generation.model,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
        )
        self.metrics.generation_began()
        task = self._loop.create_task(self._guarded(generation, request, trace))
        generation.start(task, trace, self._loop.time())
        self._watch(generation)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._finished(generation, task))

    def _request(self, generation: Generation, size: int | None = None) -> Request:
        """Make what the model is asked.

        Args:
            generation: for which reply.
            size: characters of the messages at most; None for the limit of the settings, or for
                less where the model has refused less in this conversation.
        """
        prompt, settings, conversation = generation.prompt, self._settings, generation.conversation
        if conversation is None:
            messages = [Message(turn.role, turn.content) for turn in prompt.messages or ()]
        else:
            if size is None and (refused := conversation.refused.get(generation.model)) is not None:
                size = less_than(refused)
            messages = messages_of(
                conversation.turns,
                prompt.prompt or "",
                count=settings.history_messages,
                size=settings.history_size if size is None else min(settings.history_size, size),
            )
        return Request(
            messages=tuple(messages),
            model=self._declared_name if prompt.model in {None, self.model_name} else prompt.model,
            max_tokens=generation.allowance,
            system=prompt.system or settings.system or None,
            temperature=prompt.temperature,
        )

    async def _guarded(self, generation: Generation, request: Request, trace: Span) -> End:
        """Run it, and let no model end the whole program."""
        try:
            with trace.current():
                return await self._answer(generation, request)
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError("a model tried to exit") from error

    async def _answer(self, generation: Generation, request: Request) -> End:
        """Have the model answer, with less of the conversation where it finds it too long."""
        stop = functools.partial(self.stop, generation, "disconnect")
        for attempt in itertools.count(1):
            intake = Intake(generation, self._settings, self.memory, self._loop.time, stop)
            try:
                return await intake.run(self._model, request)
            except ModelError as error:
                conversation = generation.conversation
                alone = conversation is None or len(request.messages) == 1
                if error.code not in TOO_LONG or alone or generation.log.seq:
                    raise
                assert conversation is not None
                size = sum(len(message.content) for message in request.messages)
                conversation.refused[generation.model] = size
                events.info("prompt too long", id=generation.id, messages=len(request.messages))
                request = self._request(generation, None if attempt < SHORTER else 0)
                generation.heard = self._loop.time()
        raise AssertionError

    def _watch(self, generation: Generation) -> None:
        """Cut a generation that is silent for too long; stop one that takes too long.

        One timer for both, which looks when it fires, and not one that is set anew per piece.
        """
        settings, now = self._settings, self._loop.time()
        assert generation.began is not None
        silence_ends = generation.heard + settings.silence_timeout
        reply_ends = generation.began + settings.reply_timeout
        if now >= reply_ends:
            self.stop(generation, "timeout")
        elif now >= silence_ends:
            self.stop(generation, ModelError(Code.TIMEOUT))
        else:
            generation.watch = self._loop.call_at(
                min(silence_ends, reply_ends), self._watch, generation
            )

    # Ending one.

    def _abandon(self, generation: Generation) -> None:
        events.warning("model not closed", id=generation.id, model=generation.model)
        assert generation.why is not None
        self._save(generation, generation.why)

    def _finished(self, generation: Generation, task: "asyncio.Task[End]") -> None:
        """Save what has become of a generation whose task is done, unless it is saved already."""
        self._tasks.discard(task)
        if generation.why is not None:
            self.metrics.stop_took(self._loop.time() - generation.stopped)
        if generation.state is State.STOPPING:
            assert generation.why is not None
            self._save(generation, generation.why)
        elif generation.state is State.RUNNING:
            self._save(generation, _outcome(task))

    def _save(self, generation: Generation, how: Outcome) -> None:
        """Save the end of a generation, and then tell it."""
        generation.save(how, self._loop.time())
        _cancel(generation.watch)
        _cancel(generation.grace)
        try:
            terminal = generation.terminal(how)
        except Exception as error:  # noqa: BLE001
            generation.failure = error
            terminal = generation.terminal(error)
        generation.spent = self._spending.price(generation.model).spent(terminal.usage)
        if generation.span is not None:
            generation.span.end(terminal, generation.first_token)
        self._note_upstream(generation, terminal)
        assert generation.record is not None
        self._journal.end(
            generation.record,
            terminal,
            lambda saved: self._conclude(
                generation,
                terminal if saved else terminal.model_copy(update={"saved": False}),
            ),
            # The prompt was taken back before the model was asked: the history goes on without it.
            unsaid=not generation.begun and how in TAKEN_BACK,
        )

    def _note_upstream(self, generation: Generation, terminal: Terminal) -> None:
        """Learn from an end whether the model's API works, unless it says nothing of it."""
        if isinstance(terminal, Error) and terminal.code in OUTAGE:
            self._upstream_failures += 1
            self._upstream_failed = self._loop.time()
        elif generation.begun and (isinstance(terminal, Error) or generation.log.seq):
            self._upstream_failures = 0

    def _conclude(self, generation: Generation, terminal: Terminal) -> None:
        """Write the terminal, and let the next prompt begin."""
        conversation = generation.conversation
        failure = generation.failure
        generation.end(terminal)
        if conversation is not None:
            conversation.version += 1
        if conversation is not None and generation.begun:
            turn = generation.turn(conversation.turns[-1].number + 1 if conversation.turns else 1)
            conversation.turns = self.conversations.fit([*conversation.turns, turn])
        if conversation is not None and conversation.running is generation:
            conversation.running = None
        self._live.discard(generation)
        self._shares.give(generation.account)
        self.memory.give(generation.account, generation.memory)
        self._spending.settle(generation.owner, generation.reserved, generation.spent)
        self._retain(generation)
        self._report(generation, terminal, failure)
        if conversation is not None and conversation.running is None and conversation.queue:
            self._begin(conversation.queue.popleft())
        if conversation is not None:
            self.conversations.settle(conversation)
        if not self._live:
            self._idle.set()

    def _report(
        self, generation: Generation, terminal: Terminal, failure: BaseException | None
    ) -> None:
        """Count a generation and log its one event; never what was said."""
        self.metrics.generation_ended(
            terminal,
            model=generation.model,
            dollars=generation.spent.dollars,
            seconds=generation.seconds if generation.begun else None,
            first_token=generation.first_token,
        )
        about: dict[str, object] = {
            "id": generation.id,
            "conversation": generation.conversation_id,
            "principal": generation.owner,
            "model": generation.model,
        }
        level = logging.INFO
        if isinstance(terminal, Done):
            about |= {"reason": terminal.reason, "by": terminal.by}
        else:
            about |= {"error": terminal.code, "ref": terminal.ref}
            if terminal.code is Code.INTERNAL:
                level = logging.ERROR
                about["failure"] = failure
            elif terminal.code in UPSTREAM:
                level = logging.WARNING
            if isinstance(failure, ModelError):
                about["kind"] = failure.kind
                if failure.__cause__ is not None:
                    about["cause"] = type(failure.__cause__).__name__
        first_token, usage = generation.first_token, terminal.usage
        events.log(
            level,
            "generation",
            **about,
            saved=terminal.saved,
            seconds=round(generation.seconds, 3),
            first_token=None if first_token is None else round(first_token, 3),
            input_tokens=None if usage is None else usage.input_tokens,
            output_tokens=None if usage is None else usage.output_tokens,
            dollars=generation.spent.dollars or None,
            pieces=generation.log.seq,
        )

    # Keeping the ended.

    def _retain(self, generation: Generation) -> None:
        """Keep an ended generation for the replay time, within the replay size and the memory.

        What is forgotten earlier is read from the store when somebody asks for it.
        """
        pieces, prompt = generation.log.pieces, generation.prompt
        asked = [prompt.prompt or "", prompt.system or ""]
        asked += [message.content for message in prompt.messages or ()]
        texts = sum(map(held, pieces)) + sum(map(held, asked))
        generation.size = KEPT_PER_REPLY + POINTER * len(pieces) + texts
        if not self.memory.take(CACHE, generation.size):
            self._forget_one(generation)
            return
        self._ended.append((self._loop.time() + self._settings.replay, generation))
        self._ended_size += generation.size
        if self._sweep is None:
            self._sweep = self._loop.call_at(self._ended[0][0], self._forget)
        while self._ended_size > self._settings.replay_size:
            self._forget_oldest()

    def _forget(self) -> None:
        self._sweep = None
        while self._ended and self._ended[0][0] <= self._loop.time():
            self._forget_oldest()
        if self._ended:
            self._sweep = self._loop.call_at(self._ended[0][0], self._forget)

    def _forget_oldest(self) -> None:
        _, generation = self._ended.popleft()
        self._ended_size -= generation.size
        self.memory.give(CACHE, generation.size)
        self._forget_one(generation)

    def _shed(self, size: int) -> None:
        """Forget so many bytes of ended generations, the oldest first."""
        while size > 0 and self._ended:
            size -= self._ended[0][1].size
            self._forget_oldest()

    def _forget_one(self, generation: Generation) -> None:
        key = generation.owner, generation.id
        if self._generations.get(key) is generation:  # and not a later one of the same id
            del self._generations[key]


def _new_id() -> str:
    return secrets.token_urlsafe(16)


def _outcome(task: "asyncio.Task[End]") -> Outcome:
    """Return how a task that nobody has stopped came to its end."""
    if task.cancelled():  # the model leaked a CancelledError that nobody here raised
        return asyncio.CancelledError()
    return task.exception() or task.result()


def _tokens_of(request: Request) -> int:
    """Return what a request is in tokens, about."""
    texts = [request.system or "", *(message.content for message in request.messages)]
    return sum(map(tokens_in, texts))


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
