"""The conversations of this process: those in memory, and through them the store's."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from wsserver.errors import Code, Refused
from wsserver.journal import Journal
from wsserver.live import Conversation, newest
from wsserver.settings import Settings
from wsserver.stores.base import Store, StoredConversation, Summary, Turn

__all__ = ["Conversations"]


class Conversations:
    """Finds conversations by their owner and id, and keeps those used last in memory.

    Args:
        store: where they last.
        journal: what writes them there; it is let finish before the store is asked.
        settings: how many are kept, and how much of each.
    """

    def __init__(self, store: Store, journal: Journal, settings: Settings) -> None:
        self._store = store
        self._journal = journal
        self._settings = settings
        self._known: OrderedDict[tuple[str, str], Conversation] = OrderedDict()

    async def load(self, name: str, owner: str) -> Conversation | None:
        """Return an owner's conversation from memory or from the store; None if there is none.

        Raises:
            Refused: it is being deleted.
            StoreError: the store cannot tell.
        """
        conversation = self._known.get((owner, name))
        if conversation is None:
            stored = await self._store.load(name, owner, self._settings.history_messages)
            conversation = self._known.get((owner, name))  # another may have been quicker
            if conversation is None and stored is not None:
                conversation = Conversation(name, owner, self.fit(stored.turns))
                self.keep(conversation)
        if conversation is not None and conversation.deleted:
            raise Refused(Code.NOT_FOUND)
        return conversation

    def fit(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return the newest turns, as many as are kept in memory and shown to the model."""
        return newest(turns, self._settings.history_messages, self._settings.history_size)

    def keep(self, conversation: Conversation) -> None:
        """Remember a conversation as the one used last, and forget those used least."""
        if conversation.deleted:
            return
        key = conversation.owner, conversation.id
        self._known[key] = conversation
        self._known.move_to_end(key)
        excess = len(self._known) - self._settings.conversations
        if excess > 0:
            idle = (
                key
                for key, known in self._known.items()
                if known is not conversation and not known.live and not known.watchers
            )
            for unused in tuple(itertools.islice(idle, excess)):
                del self._known[unused]

    def forget(self, conversation: Conversation) -> None:
        """Drop a conversation from memory, unless there is another of its name by now."""
        key = conversation.owner, conversation.id
        if self._known.get(key) is conversation:
            del self._known[key]

    async def history(
        self, name: str, owner: str, before: int | None
    ) -> tuple[Conversation, StoredConversation, bool]:
        """Return a conversation, and its newest turns that have ended, or those before a number.

        Returns:
            the live conversation, the turns, and whether there are older ones.

        Raises:
            Refused: the owner has no such conversation.
            StoreError: it cannot be read.
        """
        while True:
            conversation = await self.load(name, owner)
            if conversation is None:
                raise Refused(Code.NOT_FOUND)
            version = conversation.version
            await self._journal.flush()
            limit = self._settings.history_messages
            stored = await self._store.load(name, owner, limit + 1, before)
            current = self._known.get((owner, name), conversation)
            if conversation.version != version or current is not conversation:
                continue  # a reply has ended meanwhile, or it was forgotten and found again
            if conversation.deleted:
                raise Refused(Code.NOT_FOUND)
            self.keep(conversation)
            if stored is None:  # nothing of it has been saved
                stored = StoredConversation(name, owner, "", [])
            live = {generation.id for generation in conversation.live}
            turns = [turn for turn in stored.turns[-limit:] if turn.id not in live]
            told = StoredConversation(name, owner, stored.title, turns)
            return conversation, told, len(stored.turns) > limit

    async def recent(
        self, owner: str, limit: int, before: tuple[float, str] | None
    ) -> Sequence[Summary]:
        """Return an owner's conversations, newest first; see :class:`~wsserver.stores.Store`."""
        await self._journal.flush()
        return await self._store.list(owner, limit, before)

    async def rename(self, name: str, owner: str, title: str) -> None:
        """Give a conversation another title.

        Raises:
            Refused: the owner has no such conversation.
            StoreError: it cannot be saved.
        """
        await self._journal.flush()
        if not await self._store.rename(name, owner, title):
            raise Refused(Code.NOT_FOUND)
