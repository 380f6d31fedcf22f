"""This server as one node of a cluster: whose conversations it runs, and whose it follows.

The node that leases a conversation decides on it, alone and as a single server would. Another node
forwards what its clients want, and follows the replies through mirrors.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine
from typing import Any

from wsserver.cluster.leases import Leases
from wsserver.cluster.membership import Membership
from wsserver.cluster.mirrors import Mirrors, facts_of
from wsserver.cluster.peers import ALL, Body, Gone, Peers, topic_about
from wsserver.cluster.readers import Readers
from wsserver.cluster.resynchronisation import Resynchronisation
from wsserver.cluster.services import Services
from wsserver.cluster.uses import Use, Uses
from wsserver.content import Usage
from wsserver.errors import Code, ConfigError, ModelError, Refused, StoreError
from wsserver.generation import State
from wsserver.hub.elsewhere import Leaving, Moved
from wsserver.hub.endings import restored
from wsserver.hub.hub import Hub
from wsserver.hub.live import Conversation, Generation, Watcher
from wsserver.limits import Account
from wsserver.logs import log, name_node
from wsserver.pieces import Pieces
from wsserver.protocol import Done, Prompt
from wsserver.stores.base import Forgotten, Header, StoredGeneration
from wsserver.stores.postgres.nodes import Key
from wsserver.stores.postgres.store import PostgresStore
from wsserver.stores.records import dump_prompt

REJOIN = 1.0  # seconds between two attempts to join again
HEAR = 0.1  # seconds in which the nodes that leave together hear of each other


class Cluster:
    """One node of a cluster.

    Args:
        url: the address of Redis.
        store: the store that all nodes share.
        node: the id of this node, which the store knows.
        hub: the generations of this node.
        lease: seconds after which a node that does not renew is held for dead.
        timeout: seconds to wait for the answer of another node.
    """

    def __init__(
        self,
        url: str,
        store: PostgresStore,
        node: str,
        hub: Hub,
        *,
        lease: float,
        timeout: float,
    ) -> None:
        self.node = node
        name_node(lambda: self.node)
        self._store = store
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self.peers = Peers(url, node, timeout, self._resynchronise)
        self.membership = Membership(
            store,
            lease,
            on_lost=self._lost,
            on_fenced=lambda: self._spawn(self._rejoin()),
            on_others=self._check_others,
        )
        self.leases = Leases(hub, self.membership, self._sweep)
        self.readers = Readers(self.peers, hub)
        self._services = Services(self.peers, hub, self.readers, self._spawn)
        self.mirrors = Mirrors(self.peers, hub.memory, self._mirror_ended, self.forget)
        self._resynchronisation = Resynchronisation(
            hub, store, self.leases, self.mirrors, self.learn
        )
        self._uses = Uses(store, self._spawn)
        # The prompts that were forwarded, and who sent them.
        self._asking: dict[Key, Watcher | None] = {}
        self.forwarded = 0  # prompts that were sent to other nodes
        self.fenced = 0  # times that the others have buried this node
        self._leaving: set[str] = set()  # other nodes that take no more prompts
        self.watched: dict[str, Key] = {}  # topics, and the conversation of each
        self._tasks: set[asyncio.Task[None]] = set()
        listeners = self.peers.listeners
        listeners["started"], listeners["gone"] = self._on_started, self._on_gone
        listeners["renamed"], listeners["deleted"] = self._on_renamed, self._on_deleted
        listeners["resuming"] = self._on_resuming
        listeners["missed"] = lambda *_: self._resynchronise()
        listeners["leaving"] = lambda node, _: self._leaving.add(node)
        listeners["left"] = lambda *_: self.membership.look()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def open(self) -> None:
        """Join the cluster.

        Raises:
            ConfigError: Redis or the database cannot be used.
        """
        await self.peers.open()
        try:
            await self.membership.open(self.node)
        except StoreError as error:
            await self.peers.close()
            raise ConfigError(f"cluster: {error}") from error
        self.leases.open()
        self.mirrors.open()

    async def close(self) -> None:
        """Leave the cluster: all replies have ended. Idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._resynchronisation.close()
        await self.leases.close()
        self.mirrors.close()
        await self.membership.close()
        self.peers.publish(ALL, "left", {})
        await self.peers.close()

    async def others_stay(self) -> bool:
        """Tell the other nodes that this one is about to leave; return whether others stay."""
        self.peers.publish(ALL, "leaving", {})
        await asyncio.sleep(HEAR)
        with contextlib.suppress(StoreError):
            return bool((await self.membership.nodes.renew()).alive - self._leaving)
        return False

    @property
    def health(self) -> dict[str, bool]:
        """The parts that the nodes share, and whether each works, for `/readyz`."""
        return {"redis": self.peers.bus.healthy, "lease": self.membership.alive}

    # Leases.

    def holds(self, conversation: Conversation) -> bool:
        """Whether this node leases a conversation now."""
        return self.leases.holds(conversation)

    async def claim(self, conversation: Conversation) -> str | None:
        """Lease a conversation; see :meth:`wsserver.cluster.leases.Leases.claim`."""
        return await self.leases.claim(conversation)

    def _sweep(self) -> None:
        """Receive nothing more about conversations that no client here has open."""
        for topic, key in tuple(self.watched.items()):
            conversation = self._hub.conversations.known(*key)
            if conversation is None or not (conversation.watchers or conversation.pins):
                del self.watched[topic]
                self.peers.bus.unsubscribe(topic)

    # Forwarding.

    async def prompt(
        self,
        node: str,
        prompt: Prompt,
        conversation: Conversation,
        account: Account,
        sender: Watcher | None,
    ) -> Generation:
        """Send a prompt to the node that has its conversation, and follow the reply.

        Raises:
            Refused: the node refuses the prompt, or does not answer.
            Moved: the node no longer has the conversation.
            Leaving: the node takes no more prompts.
        """
        if prompt.id is None:
            prompt = prompt.model_copy(update={"id": secrets.token_urlsafe(16)})
        assert prompt.id is not None
        key = conversation.owner, prompt.id
        self._asking[key] = sender
        self.forwarded += 1
        try:
            answer = await self.peers.ask(
                node,
                "prompt",
                {
                    "owner": conversation.owner,
                    "conversation": conversation.id,
                    "account": list(account),
                    "prompt": dump_prompt(prompt),
                },
            )
            if "moved" in answer:
                raise Moved
            if "leaving" in answer:
                raise Leaving
            return self._attach(node, answer, conversation)
        except Gone:  # it may have accepted the prompt
            raise Moved from None
        finally:
            self._asking.pop(key, None)

    def _attach(self, node: str, facts: Body, conversation: Conversation | None) -> Generation:
        """Return the mirror of a generation, and let the watchers of its conversation follow it."""
        owner, name = facts["owner"], facts["id"]
        generation = self._hub.known(owner, name)
        if generation is None:
            generation = self.mirrors.add(node, facts)
            self._hub.retention.add(generation)
        mirror = generation.node is not None and generation.state is not State.ENDED
        if mirror and conversation is not None and generation.conversation is None:
            generation.conversation = conversation
            conversation.mirrors.append(generation)
            conversation.exists = True
            sender = self._asking.get((owner, name))
            for watcher in tuple(conversation.watchers):
                if watcher is not sender:
                    watcher.attach(generation)
        return generation

    def _mirror_ended(self, generation: Generation) -> None:
        conversation = generation.conversation
        if conversation is not None:
            conversation.version += 1
            if generation in conversation.mirrors:
                conversation.mirrors.remove(generation)
        terminal = generation.log.terminal
        if isinstance(terminal, Done) and terminal.by == "deleted":
            self._hub.retention.forget(generation)
        else:
            self._hub.retention.retain(generation)

    def forget(
        self, generation: Generation, *, lost: bool = False, grace: float | None = None
    ) -> None:
        """Forget a mirror that no client follows any more; see :meth:`Mirrors.unfollow`."""
        self.mirrors.unfollow(generation, lost=lost, grace=grace)
        self._hub.retention.forget(generation)
        conversation = generation.conversation
        if conversation is not None and generation in conversation.mirrors:
            conversation.mirrors.remove(generation)

    def use(
        self, owner: str, account: Account, name: str
    ) -> contextlib.AbstractAsyncContextManager[Use]:
        """Return what an owner and an account use, for the decision on a prompt."""
        return self._uses.of(owner, account, name, self.membership)

    def unreserve(self, generation: Generation) -> None:
        """Count a generation no longer: its end cannot be saved."""
        self._uses.remove(generation)

    # Following.

    async def find(self, owner: str, name: str, node: str | None) -> Generation | None:
        """Follow a generation that runs on another node; return None if it does not run there.

        Raises:
            Refused: the node does not answer.
            StoreError: the database cannot be used.
        """
        if node is None:
            node = await self._uses.node_of(owner, name)
        if node in {None, self.node}:  # it has ended just now
            return None
        assert node is not None
        try:
            answer = await self.peers.ask(node, "live", {"owner": owner, "id": name})
        except Gone:
            return None
        for facts in answer["live"]:
            conversation = None
            if facts["conversation"] is not None:
                conversation = self._hub.conversations.known(owner, facts["conversation"])
            return self._attach(node, facts, conversation)
        return None  # it has ended just now

    async def unstored(self, owner: str, name: str) -> Generation | None:
        """Follow the reply to a chat that the store does not know; return None if none runs.

        Raises:
            Refused: no node has it, and a node does not answer.
        """
        nodes = tuple(self.membership.others)
        body = {"owner": owner, "chat": name}
        asked = (self.peers.ask(node, "live", body) for node in nodes)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for node, answer in zip(nodes, answers, strict=True):
            if not isinstance(answer, BaseException):
                for facts in answer["live"]:
                    return self._attach(node, facts, None)
        for answer in answers:
            if isinstance(answer, Refused):
                raise answer
        return None

    def _on_gone(self, node: str, body: Body) -> None:
        generation = self.mirrors.named(node, body["h"])
        if generation is not None:
            self._spawn(self._settle(generation))

    async def stop(self, generation: Generation) -> None:
        """Stop a generation of another node, and wait until its request is closed.

        Raises:
            Refused: the node does not answer.
        """
        assert generation.node is not None
        body = {"owner": generation.owner, "id": generation.id}
        with contextlib.suppress(Gone):  # and the reply has ended
            await self.peers.ask(generation.node, "stop", body)

    # Conversations.

    async def watch(self, conversation: Conversation) -> None:
        """Follow what another node runs in a conversation, now and later.

        Raises:
            Refused: the node does not answer.
            StoreError: the database cannot be used.
        """
        topic = topic_about(conversation.owner, conversation.id)
        self.watched[topic] = conversation.owner, conversation.id
        try:
            await self.peers.bus.subscribe(topic)
        except TimeoutError:
            raise Refused(Code.UNAVAILABLE) from None
        await self.learn(conversation)

    async def learn(self, conversation: Conversation) -> bool:
        """Follow what another node runs in a conversation now.

        Returns:
            Whether that node has replies that it could not save yet.

        Raises:
            Refused: the node does not answer.
            StoreError: the database cannot be used.
        """
        key = conversation.owner, conversation.id
        if self.leases.has(key):
            return False
        node = await self.membership.nodes.holder(key)
        if node is None or node == self.node:
            return False
        body = {"owner": conversation.owner, "conversation": conversation.id}
        with contextlib.suppress(Gone):  # and its replies have ended
            answer = await self.peers.ask(node, "live", body)
            for facts in answer["live"]:
                self._attach(node, facts, conversation)
            return bool(answer.get("late"))  # a node of an earlier version does not tell
        return False

    def started(self, generation: Generation) -> None:
        """Tell the other nodes of a generation that this node has accepted."""
        if generation.conversation_id is not None:
            topic = topic_about(generation.owner, generation.conversation_id)
            self.peers.publish(topic, "started", facts_of(generation))

    def _on_started(self, node: str, facts: Body) -> None:
        conversation = self._hub.conversations.known(facts["owner"], facts["conversation"])
        if conversation is not None and conversation.watchers:
            self._attach(node, facts, conversation)

    def renamed(self, owner: str, name: str, title: str) -> None:
        """Tell the other nodes of the new title of a conversation."""
        body = {"owner": owner, "conversation": name, "title": title}
        self.peers.publish(topic_about(owner, name), "renamed", body)

    def _on_renamed(self, _: str, body: Body) -> None:
        conversation = self._hub.conversations.known(body["owner"], body["conversation"])
        if conversation is not None:
            conversation.renamed = True
            for watcher in tuple(conversation.watchers):
                watcher.renamed(conversation, body["title"])

    async def delete(self, node: str, conversation: Conversation) -> None:
        """Let the node that has a conversation delete it.

        Raises:
            Refused: the node refuses, or does not answer.
        """
        body = {"owner": conversation.owner, "conversation": conversation.id}
        try:
            await self.peers.ask(node, "delete", body)
        except Gone:
            raise Refused(Code.UNAVAILABLE) from None

    def deleted(self, conversation: Conversation) -> None:
        """Tell the other nodes that a conversation was deleted."""
        body = {"owner": conversation.owner, "conversation": conversation.id}
        self.peers.publish(ALL, "deleted", body)

    def _on_deleted(self, _: str, body: Body) -> None:
        conversation = self._hub.conversations.known(body["owner"], body["conversation"])
        if conversation is not None:
            self._hub.conversations.dropped(conversation)
        self._hub.retention.deleted(body["owner"], body["conversation"])

    async def resuming(self, owner: str, name: str) -> None:
        """Tell the other nodes that the page of a chat asks for its reply after a reload."""
        self.peers.publish(ALL, "resuming", {"owner": owner, "conversation": name})
        await self.peers.bus.flush()

    def _on_resuming(self, _: str, body: Body) -> None:
        self._hub.note_resuming(body["owner"], body["conversation"])

    # Faults.

    def _resynchronise(self) -> None:
        """Ask for everything that may have been lost while the bus was away."""
        self._resynchronisation.start()

    def _check_others(self, nodes: frozenset[str], since: float) -> None:
        """End what depends on nodes that had left the cluster at a time."""
        self._leaving &= nodes
        self.peers.check(nodes, since)
        self.readers.check(nodes, since)
        for generation in self.mirrors.orphans(nodes, since):
            self._spawn(self._settle(generation))

    async def _settle(self, generation: Generation) -> None:
        """End a mirror whose node has left, as the store has its end."""
        try:
            stored = await self._store.find(generation.owner, generation.id)
        except StoreError:
            return  # the next renewal tries again
        if isinstance(stored, Forgotten):
            end = Done(id=generation.id, seq=0, reason="stopped", by="deleted", usage=Usage())
            self.mirrors.end(generation, Pieces(), end)
        else:
            if stored is None:  # nothing of it was saved
                header = Header(
                    generation.id,
                    generation.owner,
                    generation.conversation_id,
                    generation.prompt,
                    generation.model,
                )
                stored = StoredGeneration(header, Pieces(), None)
            log = restored(stored).log
            assert log.terminal is not None
            self.mirrors.end(generation, log.pieces, log.terminal)
        self._hub.retention.forget(generation)  # the store has what was saved

    def _lost(self) -> None:
        """This node may be buried now: end all its replies."""
        if self._hub.scheduler.live:
            log.error("node cut off", replies=len(self._hub.scheduler.live))
        self.leases.clear()
        for generation in tuple(self._hub.scheduler.live):
            self._hub.stop(generation, ModelError(Code.INTERRUPTED))

    async def _rejoin(self) -> None:
        """Join the cluster again as another node, once the replies of this one have ended."""
        self.fenced += 1
        self._hub.journal.abandon()
        await self._hub.scheduler.idle.wait()
        self.node = self._store.node = secrets.token_hex(8)
        await self.peers.rename(self.node)
        while True:
            try:
                await self.membership.open(self.node)
                break
            except StoreError as error:
                log.warning("node not joined", reason=str(error))
            except Exception as error:  # noqa: BLE001 - without this task the node stays outside
                log.error("node not joined", failure=error)
            await asyncio.sleep(REJOIN)
        log.warning("node joined again")
        self._resynchronise()
