"""The entry point of connections: prompt, find, follow, stop, delete, and drain."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from wsserver.errors import Code, ModelError, Refused
from wsserver.generation import Follower, State
from wsserver.hub.accounts import Accounts
from wsserver.hub.conversations import Conversations
from wsserver.hub.elsewhere import Elsewhere
from wsserver.hub.journal import Journal
from wsserver.hub.live import Conversation, Generation, Watcher
from wsserver.hub.reporting import Reporter
from wsserver.hub.retention import Retention
from wsserver.hub.scheduling import Scheduler
from wsserver.hub.titles import Titles
from wsserver.hub.upkeep import Upkeep
from wsserver.limits import SECONDS_PER_DAY, Account, Memory
from wsserver.logs import log
from wsserver.models.base import Model, PushModel
from wsserver.models.readiness import Readiness
from wsserver.protocol import StoppedBy
from wsserver.settings import Settings
from wsserver.stores.base import Store
from wsserver.telemetry import Metrics

ANOTHER_LOOK = 0.05  # seconds in which another node saves that it has accepted a prompt
RESUMING = 10_000  # chats whose pages resume that are remembered, the newest
UNAWARE = 15.0  # seconds for a client to notice that its connection is dead, and to reconnect


class Hub:
    """Accepts prompts, and lets anyone follow and stop the generations of their owner.

    Each owner has ids of its own. The generations and conversations of other owners do not exist
    for it.

    Args:
        model: answers the prompts.
        store: keeps conversations and generations.
        settings: the limits and times.
        metrics: the numbers to count in.
        memory: counts the bytes that are stored for clients.
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
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self.journal = Journal(  # saves the generations to the store
            store, settings.save_interval, settings.store_timeout, metrics=metrics
        )
        # The conversations in memory; they read others from the store.
        self.conversations = Conversations(store, self.journal, settings, memory)
        self.accounts = Accounts(settings, store)  # what each account may use
        # The generations that clients can find by id.
        self.retention = Retention(store, self.journal, self.accounts, settings, memory)
        # Prepares the model, and opens connections to its API, before a prompt arrives.
        self.readiness = Readiness(model, warm=settings.warm_connections)
        self.reporter = Reporter(metrics)
        self.scheduler = Scheduler(  # accepts prompts
            model,
            settings,
            journal=self.journal,
            accounts=self.accounts,
            conversations=self.conversations,
            retention=self.retention,
            report=self.reporter,
            memory=memory,
            on_turn=self._turn_ended,
        )
        self._titles = Titles(model, settings, self.scheduler, self.conversations)
        self._runner = self.scheduler.runner
        self.model_name = self._runner.model_name  # the model's name for clients
        self.upkeep = Upkeep(  # deletes what has expired from the store
            store,
            self.delete,
            replay=settings.replay,
            retention=settings.retention_days * SECONDS_PER_DAY,
        )
        # The chats whose pages asked for a running reply: they ask again after a reload.
        self.resuming: OrderedDict[tuple[str, str], None] = OrderedDict()
        # The last reply to each chat that the store does not know, by owner and conversation.
        self._unstored: WeakValueDictionary[tuple[str, str], Generation] = WeakValueDictionary()
        self._detached: set[asyncio.Task[None]] = set()  # requests of disconnected clients
        self.elsewhere: Elsewhere | None = None  # the other nodes

    def _turn_ended(self, generation: Generation) -> None:
        self._titles.turn_ended(generation)

    @property
    def live(self) -> int:
        """The number of generations that have not ended."""
        return len(self.scheduler.live)

    @property
    def tasks(self) -> int:
        """The number of tasks that run models, including the tasks of abandoned replies."""
        return len(self._runner.tasks)

    def known(self, owner: str, generation_id: str | None) -> Generation | None:
        """Return a generation that is in memory."""
        return None if generation_id is None else self.retention.known(owner, generation_id)

    async def resume(
        self, owner: str, generation_id: str, after: int, account: Account
    ) -> tuple[Generation, int]:
        """Find a generation for a client that resumes after a piece.

        Returns:
            The generation, and how many characters a frame may merge for this client.

        Raises:
            Refused: the generation is not known, was deleted or has fewer pieces; or the account is
                over its limit of reads.
            StoreError: the store failed.
        """
        generation = await self._find(owner, generation_id, account)
        if generation is None:
            raise Refused(Code.NOT_FOUND)
        if after > max(generation.log.seq, generation.reached):
            raise Refused(Code.GAP)
        return generation, generation.resume(after, self._settings.frame_size)

    async def _find(self, owner: str, name: str, account: Account) -> Generation | None:
        found = await self.retention.find(owner, name, account)
        if found is None and self.elsewhere is not None:
            await asyncio.sleep(ANOTHER_LOOK)
            found = await self.retention.find(owner, name, account)
        return found

    async def find_live(self, owner: str, name: str, account: Account) -> Generation | None:
        """Return a generation that has not ended, on this node or on another one; else None.

        Raises:
            Refused: the account is over its limit of reads.
            StoreError: the store failed.
        """
        generation = self.known(owner, name)
        if generation is None and self.elsewhere is not None:
            with contextlib.suppress(Refused):
                generation = await self._find(owner, name, account)
        ended = generation is None or generation.state is State.ENDED
        return None if ended else generation

    async def live_in(self, owner: str, name: str) -> list[Generation]:
        """Return the generations of a conversation that have not ended, in order.

        Raises:
            Refused: the node that has the conversation does not answer.
            StoreError: the store failed.
        """
        if self.elsewhere is None:
            conversation = self.conversations.known(owner, name)
            return [] if conversation is None else conversation.live
        async with self.conversations.pin(owner, name) as conversation:
            await self.elsewhere.learn(conversation)
            return conversation.live

    def note_unstored(self, owner: str, name: str, generation: Generation) -> None:
        """Note the newest reply to a chat that the store does not know, until it has ended."""
        self._unstored[owner, name] = generation

    def known_unstored(self, owner: str, name: str) -> Generation | None:
        """Return the running reply to a chat that the store does not know, if it is in memory."""
        generation = self._unstored.get((owner, name))
        running = generation is not None and generation.log.terminal is None
        return generation if running else None

    async def unstored(self, owner: str, name: str) -> Generation | None:
        """Return the running reply to a chat that the store does not know, on any node.

        Raises:
            Refused: no node has it, and a node does not answer.
        """
        generation = self.known_unstored(owner, name)
        if generation is None and self.elsewhere is not None:
            return await self.elsewhere.unstored(owner, name)
        return generation

    # Stopping and following.

    def stop(
        self,
        generation: Generation,
        why: StoppedBy | ModelError,
        on_refused: Callable[[Refused], None] = lambda _: None,
    ) -> None:
        """Stop a generation; see :meth:`wsserver.hub.running.Runner.stop`.

        If another node runs it, that node is asked. ``on_refused`` is called if it does not answer.
        """
        if generation.node is None:
            self._runner.stop(generation, why)
        elif self.elsewhere is not None and generation.state is not State.ENDED:
            self.wait_at_close(self._loop.create_task(self._stop_elsewhere(generation, on_refused)))

    async def _stop_elsewhere(
        self, generation: Generation, on_refused: Callable[[Refused], None]
    ) -> None:
        assert self.elsewhere is not None
        try:
            await self.elsewhere.stop(generation)
        except Refused as refused:
            log.warning("stop not acknowledged", id=generation.id, other=generation.node)
            on_refused(refused)

    def follow(self, generation: Generation, follower: Follower) -> None:
        """Add a follower. A generation with a follower outlives the grace time."""
        generation.log.followers.append(follower)
        generation.readers += 1
        generation.unread = None
        if generation.grace is not None:
            generation.grace.cancel()
            generation.grace = None

    def unfollow(
        self,
        generation: Generation,
        follower: Follower,
        *,
        lost: bool = False,
        grace: float | None = None,
    ) -> None:
        """Remove a follower. A generation without followers is stopped after the grace time.

        The grace time of a client does not end earlier because another client leaves later.

        Args:
            generation: the generation.
            follower: the follower.
            lost: the connection died, and the client may not have noticed yet.
            grace: the grace time of this client in seconds, where less than the setting.
        """
        generation.log.followers.remove(follower)
        generation.readers -= 1
        now, wait = self._loop.time(), self._settings.grace
        wait = wait if grace is None else min(grace, wait)
        generation.kept_until = max(generation.kept_until, now + wait)
        if generation.node is not None:
            if not generation.readers and generation.state is not State.ENDED:
                assert self.elsewhere is not None
                self.elsewhere.forget(generation, lost=lost, grace=generation.kept_until - now)
            return
        if not generation.readers and generation.state in {State.QUEUED, State.RUNNING}:
            generation.unread = 0
            generation.unaware_until = now + UNAWARE if lost else 0.0
            due = generation.kept_until
            generation.grace = self._loop.call_at(due, self.stop, generation, "disconnect")

    def note_resuming(self, owner: str, name: str) -> None:
        """Note that the page of a chat asks for its running reply after a reload."""
        self.resuming[owner, name] = None
        self.resuming.move_to_end((owner, name))
        if len(self.resuming) > RESUMING:
            self.resuming.popitem(last=False)

    # Conversations.

    async def delete(
        self,
        owner: str,
        conversation_id: str,
        sender: Watcher | None = None,
        *,
        before: float | None = None,
    ) -> None:
        """Stop the generations of a conversation, delete it, and notify its other watchers.

        Args:
            owner: the owner.
            conversation_id: the id of the conversation.
            sender: the watcher that is not notified.
            before: delete the conversation only if it was last used before this time, in seconds
                since the epoch.

        Raises:
            Refused: the owner has no such conversation, or it is in use.
            StoreError: it cannot be deleted.
        """
        async with self.conversations.pin(owner, conversation_id) as conversation:
            if before is not None and (conversation.live or conversation.pins > 1):
                raise Refused(Code.BUSY)
            if self.elsewhere is not None:
                node = await self.elsewhere.claim(conversation)
                if node is not None:
                    await self.elsewhere.delete(node, conversation)
                    self.conversations.dropped(conversation, sender)
                    return
            conversation.deleted = True
            try:
                await self._delete(conversation, before)
            except BaseException:
                conversation.deleted = False
                raise
        self.conversations.dropped(conversation, sender)
        if self.elsewhere is not None:
            self.elsewhere.deleted(conversation)

    async def _delete(self, conversation: Conversation, before: float | None) -> None:
        """Stop the generations of a conversation, wait for the models, and delete it."""
        live = conversation.live
        for generation in reversed(live):
            self.stop(generation, "deleted")
        tasks = [generation.task for generation in live if generation.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.stop_timeout)
        await self.conversations.delete(conversation, before)
        self.retention.deleted(conversation.owner, conversation.id)

    # Shutdown.

    def refuse_prompts(self) -> None:
        """Refuse new prompts from now on."""
        self.scheduler.draining = True

    def wait_at_close(self, task: "asyncio.Task[None]") -> None:
        """Wait at the close for a task whose client has disconnected: it still needs the store."""
        self._detached.add(task)
        task.add_done_callback(self._detached.discard)

    async def drain(self, *, queued: bool = False) -> None:
        """Refuse new prompts, and let replies finish within the drain time.

        Args:
            queued: run the waiting prompts too; otherwise stop them.
        """
        self.refuse_prompts()
        await self._titles.close()
        for generation in tuple(self.scheduler.live):
            if generation.state is State.QUEUED and not queued:
                self.stop(generation, "shutdown")
        await self._until_idle(self._settings.drain_timeout)
        self._stop_all()
        await self._until_idle(self._settings.stop_timeout)

    async def _until_idle(self, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.scheduler.idle.wait()

    def _stop_all(self) -> None:
        for generation in tuple(self.scheduler.live):
            self.stop(generation, "shutdown")

    async def close(self, within: float) -> None:
        """Stop all generations, save their ends, and set no more timers. Idempotent.

        Args:
            within: seconds for models to close their requests.
        """
        self.refuse_prompts()
        await self._titles.close()
        self._stop_all()
        if tasks := {*self._runner.tasks, *self._detached}:
            await asyncio.wait(tasks, timeout=within)
        self._runner.close()
        for task in self._detached:
            task.cancel()
        self.retention.close()
        await self.readiness.close()
        await self.upkeep.close()
        await self.journal.close(within)
