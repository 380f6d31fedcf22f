"""The conversations that this node leases: while it has one, it alone decides on it."""

import asyncio
from collections.abc import Callable

from wsserver.cluster.membership import Membership
from wsserver.errors import Code, Refused, StoreError
from wsserver.hub.hub import Hub
from wsserver.hub.live import Conversation
from wsserver.logs import log
from wsserver.stores.postgres.nodes import Key

SWEEP = 0.5  # seconds between two looks at the leased conversations
SWEEP_DRAINING = 0.05  # the same, while other nodes wait for the conversations
LINGER = 5.0  # seconds for which an unused conversation stays leased


class Leases:
    """Leases conversations when they are used, and releases them some seconds after that.

    Args:
        hub: has the conversations.
        membership: this node.
        on_sweep: called before each look at the leased conversations. Must not raise.
    """

    def __init__(self, hub: Hub, membership: Membership, on_sweep: Callable[[], None]) -> None:
        self._hub = hub
        self._membership = membership
        self._on_sweep = on_sweep
        self._loop = asyncio.get_running_loop()
        # The conversations, and when each was last in use.
        self._held: dict[Key, float] = {}
        self._releasing: dict[Key, asyncio.Future[None]] = {}
        # Perhaps leased, perhaps not: the database did not confirm a lease, or a release.
        self._doubtful: set[Key] = set()
        self._sweeper: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._held.keys() | self._doubtful)

    def open(self) -> None:
        """Begin to release what is not used."""
        self._sweeper = self._loop.create_task(self._release_unused())

    async def close(self) -> None:
        """Release nothing more. Idempotent."""
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.cancel()
            await asyncio.wait({sweeper})

    def clear(self) -> None:
        """Decide on no conversation: other nodes may have them now."""
        self._doubtful.update(self._held)
        self._held.clear()

    def has(self, key: Key) -> bool:
        """Whether this node leases a conversation, or is releasing it."""
        return key in self._held

    def holds(self, conversation: Conversation) -> bool:
        """Whether this node leases a conversation now."""
        key = conversation.owner, conversation.id
        return key in self._held and key not in self._releasing and self._membership.alive

    async def claim(self, conversation: Conversation) -> str | None:
        """Lease a conversation; return the id of the node that has it, None if it is this one.

        A conversation that was not leased until now is read again from the store: another node may
        have changed it.

        Raises:
            Refused: this node is cut off from the others.
            StoreError: the database cannot be used.
        """
        key = conversation.owner, conversation.id
        while (releasing := self._releasing.get(key)) is not None:
            await asyncio.shield(releasing)
        if not self._membership.alive:
            raise Refused(Code.UNAVAILABLE)
        if key in self._held:
            self._held[key] = self._loop.time()
            return None
        nodes = self._membership.nodes
        try:
            holder = await nodes.claim(key)
        except BaseException:  # also if the client has left meanwhile
            self._doubtful.add(key)
            raise
        if self._membership.nodes is not nodes or not self._membership.alive:  # buried meanwhile
            raise Refused(Code.UNAVAILABLE)
        if holder != nodes.node:
            return holder
        if key not in self._held:
            self._held[key] = self._loop.time()
            self._doubtful.discard(key)
            self._hub.conversations.outdate(conversation)
        return None

    async def _release_unused(self) -> None:
        """Release the conversations in which nothing has happened for a while, again and again."""
        while True:
            draining = self._hub.scheduler.draining
            await asyncio.sleep(SWEEP_DRAINING if draining else SWEEP)
            try:
                self._on_sweep()
                await self._sweep(draining=draining)
            except Exception as error:  # noqa: BLE001 - without this task nothing is released
                log.error("conversations not released", failure=error)

    async def _sweep(self, *, draining: bool) -> None:
        """Release what is not used; at once while this node drains, so that others get it."""
        due = self._loop.time() - (0 if draining else LINGER)
        # A claim may be on its way for a conversation in use: its lease must not end meanwhile.
        keys = [key for key in self._doubtful if not self._in_use(key)]
        for key, used in tuple(self._held.items()):
            if self._in_use(key):
                self._held[key] = self._loop.time()
            elif used < due:
                keys.append(key)
        if keys:
            await self._release(keys)

    def _in_use(self, key: Key) -> bool:
        conversation = self._hub.conversations.known(*key)
        pinned = conversation is not None and bool(conversation.live or conversation.pins)
        return pinned or self._hub.journal.has_late(*key)

    async def _release(self, keys: list[Key]) -> None:
        released = self._loop.create_future()
        self._releasing.update(dict.fromkeys(keys, released))
        self._doubtful.update(keys)
        try:
            await self._hub.journal.flush()
            await self._membership.nodes.release(keys)
            self._doubtful.difference_update(keys)
        except StoreError as error:
            log.warning("conversations not released", reason=str(error))
        finally:
            for key in keys:
                self._held.pop(key, None)  # also in doubt: another node may have it by now
                del self._releasing[key]
            released.set_result(None)
