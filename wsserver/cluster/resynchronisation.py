"""Learns what other nodes have told while this node, or they, could not use the bus."""

import asyncio
from collections.abc import Awaitable, Callable

from wsserver.cluster.leases import Leases
from wsserver.cluster.mirrors import Mirrors
from wsserver.errors import Refused, StoreError
from wsserver.hub.hub import Hub
from wsserver.hub.live import Conversation
from wsserver.stores.base import Store


class Resynchronisation:
    """Asks for everything that may have been lost.

    Args:
        hub: has the conversations and the replies of this node.
        store: knows which conversations were deleted.
        leases: nobody else changes the conversations that this node leases.
        mirrors: the replies of other nodes.
        learn: follows what another node runs in a conversation; returns whether it has more than
            the store.
    """

    def __init__(
        self,
        hub: Hub,
        store: Store,
        leases: Leases,
        mirrors: Mirrors,
        learn: Callable[[Conversation], Awaitable[bool]],
    ) -> None:
        self._hub = hub
        self._store = store
        self._leases = leases
        self._mirrors = mirrors
        self._learn = learn
        self._task: asyncio.Task[None] | None = None
        self._again = False  # something was lost during the run of the task

    def start(self) -> None:
        """Ask, now and once more if something was lost meanwhile."""
        self._mirrors.follow_again()
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Ask no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        while self._again:
            self._again = False
            for conversation in self._hub.conversations:
                key = conversation.owner, conversation.id
                if not self._leases.has(key):
                    await self._update(conversation)
            self._hub.retention.outdate(self._leases.has)

    async def _update(self, conversation: Conversation) -> None:
        """Learn what happened in a conversation."""
        if conversation.idle:  # it is read again when a client uses it
            self._hub.conversations.forget(conversation)
            return
        try:
            late = await self._learn(conversation)
            if late or conversation.live or conversation.pins:
                return
            name, owner = conversation.id, conversation.owner
            stored = await self._store.load(owner, name, limit=1, size=1)
        except (Refused, StoreError):
            return  # the node that has it, or the database, is away
        if stored is None and not (conversation.live or conversation.pins):
            self._hub.conversations.dropped(conversation)
