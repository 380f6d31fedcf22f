"""The generations of this process: accept prompts, find, follow and stop generations, drain.

A decision reads what it needs from the store first. Then it is made at once, without waiting.
"""

import asyncio
import contextlib
import secrets

from wsserver.accounts import Accounts
from wsserver.conversations import Conversations
from wsserver.errors import Code, ModelError, Refused
from wsserver.generation import Follower, State
from wsserver.journal import Journal
from wsserver.limits import SECONDS_PER_DAY, Account, Memory
from wsserver.live import Conversation, Generation, Watcher
from wsserver.models.base import Model, PushModel
from wsserver.protocol import Prompt, StoppedBy
from wsserver.reporting import Reporter
from wsserver.retention import Retention
from wsserver.running import Runner
from wsserver.settings import Settings
from wsserver.stores.base import Header, Store
from wsserver.telemetry import Metrics
from wsserver.upkeep import Upkeep

__all__ = ["Hub"]

UNAWARE = 15.0  # seconds in which a client notices that its connection is dead, and connects again


class Hub:
    """Accepts prompts, and lets anyone follow and stop the generations of their owner.

    The ids of generations and conversations belong to their owner. For everyone else they do not
    exist.

    Args:
        model: answers the prompts.
        store: keeps conversations and generations.
        settings: the limits and times.
        metrics: the numbers to count in.
        memory: counts the bytes that the process holds for clients.

    Attributes:
        accounts: what each account may use.
        conversations: the conversations in memory, and through them those of the store.
        model_name: the model's name for clients.
        retention: the generations that clients can find by id.
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
        self.metrics = metrics
        self._store = store
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._journal = Journal(
            store, settings.save_interval, settings.store_timeout, metrics=metrics
        )
        self.conversations = Conversations(store, self._journal, settings, memory)
        self.accounts = Accounts(settings, store)
        self.retention = Retention(store, self._journal, self.accounts, settings, memory)
        self._report = Reporter(metrics)
        self._runner = Runner(
            model,
            settings,
            self._journal,
            memory,
            price=self.accounts.price,
            report=self._report,
            on_ended=self._ended,
        )
        self.model_name = self._runner.model_name
        self._upkeep = Upkeep(
            store,
            self.delete,
            replay=settings.replay,
            retention=settings.retention_days * SECONDS_PER_DAY,
        )
        self._live: set[Generation] = set()
        self._errands: set[asyncio.Task[None]] = set()  # requests of clients that have gone
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """The number of generations that have not ended."""
        return len(self._live)

    @property
    def running(self) -> list[Generation]:
        """The generations whose model has been asked and has not closed its request."""
        asked = {State.RUNNING, State.STOPPING}
        return [generation for generation in self._live if generation.state in asked]

    @property
    def tasks(self) -> int:
        """The number of tasks that run models, also for replies that were abandoned."""
        return len(self._runner.tasks)

    @property
    def upstream_failing(self) -> bool:
        """Whether the model's API has just failed several times in a row."""
        return self._report.upstream_failing

    async def probe(self) -> None:
        """Find out whether the store saves.

        Raises:
            StoreError: the store does not save.
        """
        await self._journal.probe()

    def known(self, owner: str, generation_id: str | None) -> Generation | None:
        """Return a generation that is in memory."""
        return None if generation_id is None else self.retention.known(owner, generation_id)

    async def find(self, owner: str, generation_id: str, account: Account) -> Generation | None:
        """Return a generation; see :meth:`wsserver.retention.Retention.find`."""
        return await self.retention.find(owner, generation_id, account)

    # Accepting a prompt.

    async def prompt(
        self, prompt: Prompt, owner: str, account: Account, own: str | None, sender: Watcher
    ) -> Generation:
        """Accept a prompt: start a generation, queue it, or return the one that it already has.

        Args:
            prompt: what the client sent.
            owner: for whom.
            account: whose limits count.
            own: the id of the conversation that goes on where the prompt names none; None makes
                a new conversation.
            sender: the watcher that need not be told of the generation.

        Raises:
            Refused: the prompt is not accepted, and nothing has changed.
            StoreError: the conversation cannot be read.
        """
        self._check(prompt)
        if prompt.id is not None:
            found = await self.find(owner, prompt.id, account)
            if found is not None:
                return _of_prompt(found, prompt)
        self._check_limits(account)
        async with contextlib.AsyncExitStack() as stack:
            conversation = None
            if prompt.messages is None:
                name = prompt.conversation or own
                conversation = await stack.enter_async_context(
                    self.conversations.hold(name or _new_id(), owner, load=name is not None)
                )
            new = conversation is not None and not conversation.exists
            await self.accounts.check_store(owner, new=new)
            # Nothing is awaited from here on. What the awaits above may have changed is checked
            # again: the same prompt, a delete, a drain, the limits.
            known = self.known(owner, prompt.id)
            if known is not None:
                return _of_prompt(known, prompt)
            self._check_limits(account)
            return self._accept(prompt, owner, account, conversation, sender)

    def _check(self, prompt: Prompt) -> None:
        settings = self._settings
        if (size := prompt.size) > settings.prompt_size:
            raise Refused(
                Code.TOO_LONG, f"The prompt has {size} bytes; {settings.prompt_size} are allowed."
            )
        if prompt.model not in {None, self.model_name, *settings.models}:
            raise Refused(Code.MODEL_NOT_ALLOWED)

    def _check_limits(self, account: Account) -> None:
        if self._draining:
            raise Refused(Code.SHUTTING_DOWN)
        self.accounts.check(account, self.live)

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

    def _accept(
        self,
        prompt: Prompt,
        owner: str,
        account: Account,
        conversation: Conversation | None,
        sender: Watcher,
    ) -> Generation:
        if conversation is not None:
            self._check_turn(prompt, conversation)
        model = prompt.model or self.model_name
        generation = Generation(
            id=prompt.id or _new_id(),
            owner=owner,
            account=account,
            prompt=prompt,
            allowance=self.accounts.allow(prompt, owner, model),
            model=model,
            conversation_id=None if conversation is None else conversation.id,
            conversation=conversation,
            accepted=self._loop.time(),
        )
        if not self.memory.take(account, generation.prompt_size):
            raise Refused(Code.LIMIT, "The server's memory is full. Try again later.")
        generation.memory = generation.prompt_size
        generation.asked = self._runner.estimate(self._runner.request(generation))
        self.accounts.book(generation)
        self.retention.add(generation)
        self._live.add(generation)
        self._idle.clear()
        running = None if conversation is None else conversation.running
        header = Header(
            generation.id,
            owner,
            generation.conversation_id,
            prompt,
            model,
            retry_of=prompt.retry_of,
        )
        generation.record = self._journal.begin(header, generation.log, waits=running is not None)
        if conversation is not None:
            conversation.exists = conversation.loaded = True
        if conversation is None or running is None:
            self._start(generation)
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

    def _start(self, generation: Generation) -> None:
        conversation, retried = generation.conversation, generation.prompt.retry_of
        if conversation is not None:
            conversation.running = generation
            if retried is not None:
                conversation.turns = [turn for turn in conversation.turns if turn.id != retried]
        self._runner.start(generation)

    def _ended(self, generation: Generation) -> None:
        """Give back what a generation held, and start the next prompt of its conversation."""
        self._live.discard(generation)
        self.accounts.settle(generation)
        self.memory.give(generation.account, generation.memory)
        conversation = generation.conversation
        if conversation is not None and conversation.deleted:
            self.retention.forget(generation)
        else:
            self.retention.keep(generation)
        if conversation is not None:
            self._go_on(conversation, generation)
        if not self._live:
            self._idle.set()

    def _go_on(self, conversation: Conversation, ended: Generation) -> None:
        conversation.version += 1
        if ended.began is not None:
            number = conversation.turns[-1].number + 1 if conversation.turns else 1
            turns = [*conversation.turns, ended.turn(number)]
            conversation.turns = self.conversations.fit(turns)
        if conversation.running is ended:
            conversation.running = None
            if conversation.queue:
                self._start(conversation.queue.pop(0))
        self.conversations.settle(conversation)

    # Stopping and following.

    def stop(self, generation: Generation, why: StoppedBy | ModelError) -> None:
        """Stop a generation; see :meth:`wsserver.running.Runner.stop`."""
        self._runner.stop(generation, why)

    def follow(self, generation: Generation, follower: Follower) -> None:
        """Wake the follower from now on, and let the generation go on for its sake."""
        generation.log.followers.append(follower)
        generation.readers += 1
        generation.unread = None
        if generation.grace is not None:
            generation.grace.cancel()
            generation.grace = None

    def unfollow(self, generation: Generation, follower: Follower, *, lost: bool = False) -> None:
        """Wake the follower no more. The grace time begins when the last follower leaves.

        Args:
            generation: what it followed.
            follower: the one that leaves.
            lost: the connection of the follower is dead, and the client may not know yet.
        """
        generation.log.followers.remove(follower)
        generation.readers -= 1
        if not generation.readers and generation.state in {State.QUEUED, State.RUNNING}:
            generation.unread = 0
            generation.unaware_until = self._loop.time() + UNAWARE if lost else 0.0
            generation.grace = self._loop.call_later(
                self._settings.grace, self.stop, generation, "disconnect"
            )

    # Conversations.

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
            conversation_id: which conversation.
            owner: whose.
            sender: the watcher that need not be told.
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
        self._journal.deleted(conversation.owner, conversation.id)
        self.retention.deleted(conversation.owner, conversation.id)
        self.conversations.forget(conversation)

    # Ending all.

    def see_through(self, task: "asyncio.Task[None]") -> None:
        """Keep a task whose client has gone, and wait for the task before the store is closed."""
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

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
        """Stop whatever still runs, save all ends, and set no more timers. Idempotent.

        Args:
            within: seconds that models get to close their requests.
        """
        self._draining = True
        for generation in tuple(self._live):
            self.stop(generation, "shutdown")
        if tasks := {*self._runner.tasks, *self._errands}:
            await asyncio.wait(tasks, timeout=within)
        self._runner.close()
        for task in self._errands:
            task.cancel()
        self.retention.close()
        await self._upkeep.close()
        await self._journal.close(within)


def _of_prompt(generation: Generation, prompt: Prompt) -> Generation:
    """Return the generation that is known under the id of a prompt which is sent again.

    Raises:
        Refused: the generation belongs to another prompt.
    """
    if generation.prompt != prompt:
        raise Refused(Code.ID_CONFLICT)
    return generation


def _new_id() -> str:
    return secrets.token_urlsafe(16)
