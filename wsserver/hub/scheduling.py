"""Accepts prompts, and starts each generation when its conversation is free.

The scheduler first reads from the store. Then it checks and starts a prompt without an ``await``.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable

from wsserver.errors import Code, Refused
from wsserver.hub.accounts import Accounts
from wsserver.hub.context import tokens_of
from wsserver.hub.conversations import Conversations
from wsserver.hub.elsewhere import Elsewhere, Leaving, Moved, Running
from wsserver.hub.journal import Journal
from wsserver.hub.live import Conversation, Generation, Watcher
from wsserver.hub.reporting import Reporter
from wsserver.hub.retention import Retention
from wsserver.hub.running import Runner
from wsserver.hub.tally import Tally
from wsserver.limits import Account, Memory
from wsserver.models.base import Model, PushModel, Request
from wsserver.protocol import Prompt
from wsserver.settings import Settings
from wsserver.stores.base import Header

ATTEMPTS = 5  # to forward a prompt whose conversation changes its node
HAND_OVER = 0.1  # seconds between two looks at a conversation that its node is about to release


class Scheduler:
    """Accepts prompts, and runs one generation of a conversation at a time.

    Args:
        model: answers the prompts.
        settings: the limits and times.
        journal: saves what is accepted, and how it ends.
        accounts: what each account may use.
        conversations: the conversations in memory and in the store.
        retention: finds the generation of a prompt that is sent again.
        report: reports each start and end.
        memory: counts the bytes of the generations.
        on_turn: called with each generation of a conversation that has ended.
    """

    def __init__(
        self,
        model: Model | PushModel,
        settings: Settings,
        *,
        journal: Journal,
        accounts: Accounts,
        conversations: Conversations,
        retention: Retention,
        report: Reporter,
        memory: Memory,
        on_turn: Callable[[Generation], None],
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._accounts = accounts
        self._conversations = conversations
        self._retention = retention
        self._memory = memory
        self._on_turn = on_turn
        self._loop = asyncio.get_running_loop()
        self.runner = Runner(  # runs the generations
            model,
            settings,
            journal,
            memory,
            price=accounts.price,
            report=report,
            on_ended=self._ended,
        )
        # The models that a prompt can choose, the default first.
        self.models = tuple(dict.fromkeys((self.runner.model_name, *settings.models)))
        self.live: set[Generation] = set()  # the generations that have not ended
        self.idle = asyncio.Event()  # set while there are none
        self.idle.set()
        self.draining = False  # no more prompts are accepted
        self.elsewhere: Elsewhere | None = None  # the other nodes

    async def accept(
        self,
        prompt: Prompt,
        owner: str,
        account: Account,
        own: str | None,
        sender: Watcher | None,
        *,
        forwarded: bool = False,
    ) -> Generation:
        """Accept a prompt: start or queue a generation, or return the known one with this id.

        Args:
            prompt: what the client sent.
            owner: the owner of the conversation.
            account: the account whose limits apply.
            own: the id of the conversation for a prompt that names none; None starts a new one.
            sender: the watcher that is not notified.
            forwarded: another node has sent the prompt, because this one has the conversation.

        Raises:
            Refused: the prompt is not accepted, and nothing has changed.
            StoreError: the conversation cannot be read.
            Moved: a forwarded prompt has to go to another node.
        """
        self._check(prompt)
        if prompt.id is not None:
            found = await self._retention.find(owner, prompt.id, account)
            if found is not None:
                return _of_prompt(found, prompt)
        generation = prompt.id or _new_id()
        if self.elsewhere is not None:  # nodes know the prompt by its id
            prompt = prompt.model_copy(update={"id": generation})
        self.check_limits(account)
        async with contextlib.AsyncExitStack() as stack:
            conversation = None
            if prompt.messages is None:
                name = prompt.conversation or own
                conversation = await stack.enter_async_context(
                    self._conversations.pin(owner, name or _new_id())
                )
                if self.elsewhere is not None:
                    mirror = await self._forward(
                        self.elsewhere, prompt, conversation, account, sender, forwarded=forwarded
                    )
                    if mirror is not None:
                        return mirror
                if name is not None:
                    await self._conversations.load(conversation)
            new = conversation is not None and not conversation.exists
            try:
                async with self._accounts.tally(owner, account, generation, new=new) as tally:
                    return self._accept(
                        prompt,
                        owner,
                        account,
                        name=generation,
                        tally=tally,
                        conversation=conversation,
                        sender=sender,
                    )
            except Running as running:
                return await self._running(generation, prompt, owner, running.node)

    async def _running(self, name: str, prompt: Prompt, owner: str, node: str) -> Generation:
        """Return the generation of a prompt that another node has just accepted."""
        assert self.elsewhere is not None
        found = await self.elsewhere.find(owner, name, node)
        if found is None:
            raise Refused(Code.UNAVAILABLE)
        return _of_prompt(found, prompt)

    async def _forward(
        self,
        elsewhere: Elsewhere,
        prompt: Prompt,
        conversation: Conversation,
        account: Account,
        sender: Watcher | None,
        *,
        forwarded: bool,
    ) -> Generation | None:
        """Send a prompt to the node that has the conversation; return None if this one has it.

        If that node takes no more prompts, this waits until the conversation is free.
        """
        assert prompt.id is not None
        settings, attempts = self._settings, 0
        until = self._loop.time() + settings.drain_timeout + settings.stop_timeout
        while attempts < ATTEMPTS and self._loop.time() < until:
            node = await elsewhere.claim(conversation)
            if node is None:
                if not attempts:
                    return None
                # The node that had the conversation may have accepted the prompt.
                return await self._retention.find(conversation.owner, prompt.id, account)
            if forwarded:
                raise Moved
            try:
                return await elsewhere.prompt(node, prompt, conversation, account, sender)
            except Moved:
                attempts += 1
            except Leaving:
                await asyncio.sleep(HAND_OVER)
        raise Refused(Code.UNAVAILABLE)

    async def accept_own(self, prompt: Prompt, owner: str, account: Account) -> Generation:
        """Accept a prompt of the server's own, outside of conversations, for any model.

        The limits have to leave room for a prompt of the client.

        Args:
            prompt: the prompt.
            owner: the owner whose budget pays.
            account: the account whose limits apply.

        Raises:
            Refused: the prompt is not accepted, and nothing has changed.
            StoreError: the spending of the owner cannot be read.
        """
        name = _new_id()
        async with self._accounts.tally(owner, account, name, new=False) as tally:
            self._check_server(spare=1)
            tally.check(account, spare=1)
            return self._accept(prompt, owner, account, name=name, tally=tally)

    def accept_now(
        self, prompt: Prompt, owner: str, account: Account, own: str | None, sender: Watcher | None
    ) -> Generation | None:
        """Accept a prompt as :meth:`accept` does, if the store need not be read first.

        Returns:
            The generation; None if the store has to be read first, and then nothing has changed.

        Raises:
            Refused: the prompt is not accepted, and nothing has changed.
        """
        if prompt.id is not None:
            return None
        name, new = prompt.conversation or own, False
        if prompt.messages is None:
            known = None if name is None else self._conversations.known(owner, name)
            if name is not None and (known is None or not known.loaded):
                return None
            new = known is None or not known.exists
        tally = self._accounts.tally_now(owner, new=new)
        if tally is None:
            return None
        self._check(prompt)
        if prompt.messages is not None:
            return self._accept(prompt, owner, account, name=_new_id(), tally=tally)
        conversation = self._conversations.pin_now(owner, name or _new_id())
        try:
            return self._accept(
                prompt,
                owner,
                account,
                name=_new_id(),
                tally=tally,
                conversation=conversation,
                sender=sender,
            )
        finally:
            self._conversations.unpin(conversation)

    def _check(self, prompt: Prompt) -> None:
        settings = self._settings
        if (size := prompt.size) > settings.prompt_size:
            raise Refused(
                Code.TOO_LONG,
                f"The prompt has {size:,} bytes; {settings.prompt_size:,} are allowed. Shorten it.",
            )
        if prompt.model is not None and prompt.model not in self.models:
            raise Refused(Code.MODEL_NOT_ALLOWED)

    def check_limits(self, account: Account) -> None:
        """Check that an account may send a prompt now. This check does not use the store.

        Raises:
            Refused: the server is shutting down, or it or the account is at a limit.
        """
        self._check_server()
        self._accounts.check(account)

    def _check_server(self, spare: int = 0) -> None:
        if self.draining:
            raise Refused(Code.SHUTTING_DOWN)
        if len(self.live) + spare >= self._settings.generations:
            raise Refused(
                Code.LIMIT,
                "The server is writing its maximum number of replies. Try again in a moment.",
            )

    def _accept(
        self,
        prompt: Prompt,
        owner: str,
        account: Account,
        *,
        name: str,
        tally: Tally,
        conversation: Conversation | None = None,
        sender: Watcher | None = None,
    ) -> Generation:
        """Accept a prompt whose conversation is pinned, without an ``await``.

        All facts that may change during an ``await`` of the caller are checked here: another
        request may have sent the same prompt, deleted the conversation, drained the server or used
        up a limit.
        """
        known = None if prompt.id is None else self._retention.known(owner, name)
        if known is not None:
            return _of_prompt(known, prompt)
        self._check_server()
        tally.check(account)
        if conversation is not None:
            self._check_conversation(conversation, prompt)
        model = prompt.model or self.runner.model_name
        generation = Generation(
            id=name,
            owner=owner,
            account=account,
            prompt=prompt,
            allowance=tally.allow(prompt, owner, model),
            model=model,
            conversation_id=None if conversation is None else conversation.id,
            conversation=conversation,
            accepted=self._loop.time(),
        )
        request = self.runner.request(generation)
        generation.input_tokens = tokens_of(request)
        generation.memory = generation.prompt_size
        if not self._memory.acquire(account, generation.memory):
            raise Refused(Code.LIMIT, "The server's memory is full. Try again later.")
        tally.book(generation)
        self._retention.add(generation)
        self.live.add(generation)
        self.idle.clear()
        running = None if conversation is None else conversation.running
        header = Header(
            generation.id,
            owner,
            generation.conversation_id,
            prompt,
            model,
            self._journal.now(),
            prompt.retry_of,
        )
        generation.record = self._journal.begin(header, generation.log, waits=running is not None)
        if conversation is not None:
            conversation.exists = conversation.loaded = True
        if conversation is None or running is None:
            # The request of a retry is made in `start`, after the replaced turn was removed.
            self._start(generation, request if prompt.retry_of is None else None)
        else:
            if prompt.on_busy == "interrupt":
                for waiting in tuple(conversation.queue):
                    self.runner.stop(waiting, "replaced")
                self.runner.stop(running, "replaced")
            conversation.queue.append(generation)
        if conversation is not None:
            for watcher in tuple(conversation.watchers):
                if watcher is not sender:
                    watcher.attach(generation)
            if self.elsewhere is not None:
                self.elsewhere.started(generation)
        return generation

    def _check_conversation(self, conversation: Conversation, prompt: Prompt) -> None:
        if self.elsewhere is not None and not self.elsewhere.holds(conversation):
            raise Refused(Code.UNAVAILABLE)  # this node has lost its lease meanwhile
        conversation.check(prompt, self._settings.queue_size)

    def _start(self, generation: Generation, request: Request | None = None) -> None:
        conversation, retried = generation.conversation, generation.prompt.retry_of
        if conversation is not None:
            conversation.running = generation
            if retried is not None:
                conversation.turns = [turn for turn in conversation.turns if turn.id != retried]
        self.runner.start(generation, request)

    def _ended(self, generation: Generation) -> None:
        """Release what a generation used, and start the next prompt of its conversation."""
        self.live.discard(generation)
        if not self.live:
            self.idle.set()
        self._accounts.settle(generation)
        self._memory.release(generation.account, generation.memory)
        conversation = generation.conversation
        if conversation is not None and conversation.deleted:
            self._retention.forget(generation)
        else:
            self._retention.retain(generation)
        if conversation is not None:
            self._start_next(conversation, generation)
            self._on_turn(generation)

    def _start_next(self, conversation: Conversation, ended: Generation) -> None:
        conversation.version += 1
        if ended.began is not None:
            number = conversation.turns[-1].number + 1 if conversation.turns else 1
            turns = [*conversation.turns, ended.turn(number)]
            conversation.turns = self._conversations.fit(turns)
        if conversation.running is ended:
            conversation.running = None
            if conversation.queue:
                self._start(conversation.queue.pop(0))
        self._conversations.count_memory(conversation)


def _of_prompt(generation: Generation, prompt: Prompt) -> Generation:
    """Return a known generation whose prompt is sent again.

    Raises:
        Refused: another prompt has this id.
    """
    if generation.prompt != prompt:
        raise Refused(Code.ID_CONFLICT)
    return generation


def _new_id() -> str:
    return secrets.token_urlsafe(16)
