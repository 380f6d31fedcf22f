"""Conversations: one object each in memory, and all of them in the store."""

import asyncio
import contextlib
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

from wsserver.errors import Code, Refused, StoreError
from wsserver.hub.context import newest
from wsserver.hub.elsewhere import Elsewhere
from wsserver.hub.journal import Journal
from wsserver.hub.live import Conversation, Watcher
from wsserver.limits import CACHE, Memory, account_of
from wsserver.settings import Settings
from wsserver.stores.base import Store, StoredConversation, Summary, Turn

TURN = 320  # bytes of a turn in memory besides its texts
LOOKS = 16  # conversations that one use checks at most, to drop idle ones over the limit
UTF8 = 4  # bytes of a character in UTF-8 at most


class Conversations:
    """Keeps the conversations that were used last in memory, and reads others from the store.

    Args:
        store: has all conversations.
        journal: writes to the store. Reads wait for its pending writes.
        settings: the number of conversations in memory, and of turns of each.
        memory: counts the bytes of the turns. Turns of conversations without a live generation
            count as cached: the store has them, and they are dropped first.
    """

    def __init__(self, store: Store, journal: Journal, settings: Settings, memory: Memory) -> None:
        self._store = store
        self._journal = journal
        self._settings = settings
        self._memory = memory
        memory.shed_by(self.shed)
        self.elsewhere: Elsewhere | None = None  # the other nodes
        self._known: OrderedDict[tuple[str, str], Conversation] = OrderedDict()

    def __iter__(self) -> Iterator[Conversation]:
        return iter(tuple(self._known.values()))

    def known(self, owner: str, name: str) -> Conversation | None:
        """Return a conversation that is in memory."""
        return self._known.get((owner, name))

    def shed(self, size: int) -> None:
        """Drop at least ``size`` bytes of unused turns, the least recently used first."""
        for conversation in tuple(self._known.values()):
            if size <= 0:
                return
            if conversation.size and not (conversation.pins or conversation.live):
                size -= conversation.size
                self._unload(conversation)

    @contextlib.asynccontextmanager
    async def pin(
        self, owner: str, name: str, *, load: bool = False
    ) -> AsyncIterator[Conversation]:
        """Keep the object of a conversation in memory for the time of a request.

        All requests of one conversation share one object. So after an ``await`` a request sees the
        changes that other requests made during the ``await``.

        Args:
            owner: the owner of the conversation.
            name: the id of the conversation.
            load: read the turns from the store, if they are not in memory.

        Raises:
            Refused: the conversation was deleted, or is being deleted.
            StoreError: the store cannot read the conversation.
        """
        conversation = self.pin_now(owner, name)
        try:
            if load:
                await self._load_once(conversation)
            if conversation.deleted:
                raise Refused(Code.NOT_FOUND)
            yield conversation
        finally:
            self.unpin(conversation)

    def pin_now(self, owner: str, name: str) -> Conversation:
        """Pin a conversation until :meth:`unpin`, without reading its turns."""
        key = owner, name
        conversation = self._known.get(key)
        if conversation is None:
            conversation = self._known[key] = Conversation(id=name, owner=owner)
        conversation.pins += 1
        return conversation

    def unpin(self, conversation: Conversation) -> None:
        """Undo one :meth:`pin_now`."""
        conversation.pins -= 1
        self.count_memory(conversation)
        useful = conversation.loaded and conversation.exists and not conversation.deleted
        if conversation.idle and not useful:
            self.forget(conversation)
        else:  # its watchers may leave without another use
            self._used(conversation)

    async def load(self, conversation: Conversation) -> None:
        """Read the turns of a pinned conversation from the store, if they are not in memory.

        Raises:
            Refused: the conversation was deleted, or there is no memory for it.
            StoreError: the store cannot read the conversation.
        """
        await self._load_once(conversation)
        if conversation.deleted:
            raise Refused(Code.NOT_FOUND)

    def outdate(self, conversation: Conversation) -> None:
        """Read the turns of a conversation again at its next use: another node may have more."""
        if not conversation.live:
            self._unload(conversation)
            self._known.setdefault((conversation.owner, conversation.id), conversation)

    def dropped(self, conversation: Conversation, sender: Watcher | None = None) -> None:
        """Notify the watchers of a deleted conversation, except the sender."""
        for watcher in tuple(conversation.watchers):
            if watcher is not sender:
                watcher.drop(conversation)
        conversation.watchers.clear()
        self.forget(conversation)

    async def _load_once(self, conversation: Conversation) -> None:
        """Read the turns, unless they are in memory. One request reads, others wait for it."""
        while not conversation.loaded:
            if conversation.loading is None:
                conversation.loading = asyncio.Lock()
                try:
                    async with conversation.loading:
                        await self._load(conversation)
                finally:
                    conversation.loading = None
            else:
                async with conversation.loading:
                    pass

    async def _load(self, conversation: Conversation) -> None:
        await self._save_late(conversation)
        stored = await self._store.load(
            conversation.owner,
            conversation.id,
            limit=self._settings.history_messages,
            size=UTF8 * self._settings.history_size,
        )
        conversation.loaded = True
        if stored is not None:
            conversation.exists = True
            conversation.turns = self.fit(stored.turns)
        if not self.count_memory(conversation):
            if not conversation.live:
                self._unload(conversation)
            raise Refused(Code.LIMIT, "The server's memory is full. Try again later.")

    async def _save_late(self, conversation: Conversation) -> None:
        """Save the ended replies of a conversation that the journal could not save before.

        Raises:
            StoreError: the store still cannot save them.
        """
        if self._journal.has_late(conversation.owner, conversation.id):
            await self._journal.flush()
            if self._journal.has_late(conversation.owner, conversation.id):
                raise StoreError("a reply of the conversation is not saved yet")

    def fit(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return the newest turns that fit into the history for the model."""
        return newest(turns, self._settings.history_messages, self._settings.history_size)

    def _used(self, conversation: Conversation) -> None:
        """Note that a conversation is used. Forget idle ones over the limit, the oldest first."""
        key = conversation.owner, conversation.id
        if self._known.get(key) is not conversation:
            return
        self._known.move_to_end(key)
        excess = len(self._known) - self._settings.conversations
        # A few per call are enough, because each call adds at most one. Conversations in use move
        # to the end, so that later calls do not check them again.
        for oldest in tuple(itertools.islice(self._known.values(), LOOKS if excess > 0 else 0)):
            if oldest.idle:
                self.forget(oldest)
                excess -= 1
                if not excess:
                    return
            else:
                self._known.move_to_end((oldest.owner, oldest.id))

    def forget(self, conversation: Conversation) -> None:
        """Drop a conversation from memory, unless its id has another object by now."""
        key = conversation.owner, conversation.id
        if self._known.get(key) is conversation:
            del self._known[key]
            self._memory.release(conversation.account, conversation.size)
            conversation.size = 0

    def count_memory(self, conversation: Conversation) -> bool:
        """Count the bytes of a conversation's turns after a change of the turns or of their use.

        Returns:
            False if there is no memory for them. The turns of a conversation in use are then kept
            and not counted; other turns are dropped.
        """
        if self._known.get((conversation.owner, conversation.id)) is not conversation:
            return True
        in_use = conversation.pins or conversation.live
        account = account_of(conversation.owner) if in_use else CACHE
        if conversation.measured is not conversation.turns:  # each change makes new ones
            conversation.measured = conversation.turns
            conversation.turns_size = sum(TURN + turn.memory for turn in conversation.turns)
        size = conversation.turns_size
        if (account, size) != (conversation.account, conversation.size):
            self._memory.release(conversation.account, conversation.size)
            conversation.account, conversation.size = account, 0
            if not self._memory.acquire(account, size):
                if not in_use:
                    self._unload(conversation)
                return False
            conversation.size = size
        return True

    def _unload(self, conversation: Conversation) -> None:
        """Drop the turns of a conversation, and the conversation itself if it is idle.

        The store has the turns. Watchers keep watching.
        """
        self._memory.release(conversation.account, conversation.size)
        conversation.size = 0
        conversation.turns, conversation.loaded = (), False
        if conversation.idle:
            self.forget(conversation)

    async def history(
        self, conversation: Conversation, before: int | None, size: int
    ) -> StoredConversation:
        """Return the newest turns that ended, or those before a number.

        Args:
            conversation: the conversation, pinned by the caller.
            before: the number of a turn: only older turns are returned. None for the newest turns.
            size: bytes of turns at most, as UTF-8.

        Raises:
            Refused: the owner has no such conversation.
            StoreError: the store cannot read the conversation.
        """
        while True:
            if conversation.deleted:
                raise Refused(Code.NOT_FOUND)
            name, owner, version = conversation.id, conversation.owner, conversation.version
            await self._journal.flush()
            await self._save_late(conversation)
            stored = await self._store.load(
                owner, name, limit=self._settings.history_messages, size=size, before=before
            )
            if conversation.version != version or conversation.deleted:
                continue  # a reply ended during the awaits, or the conversation was deleted
            if stored is None and not conversation.exists:
                raise Refused(Code.NOT_FOUND)
            if stored is None:  # the store has nothing of the conversation yet
                stored = StoredConversation(name, owner, "", [])
            live = {generation.id for generation in conversation.live}
            turns = [turn for turn in stored.turns if turn.id not in live]
            return replace(stored, turns=turns)

    async def recent(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, newest first; see :class:`~wsserver.stores.Store`."""
        await self._journal.flush()
        return await self._store.list(owner, limit, before)

    async def delete(self, conversation: Conversation, before: float | None) -> None:
        """Delete a conversation in which nothing runs, and drop it from memory.

        The store remembers the ids of deleted replies, so that their prompts do not run again. It
        can do so only for saved replies. So a conversation with an unsaved reply is not deleted.

        Args:
            conversation: the conversation, pinned by the caller.
            before: delete it only if it was last used before this time, in seconds since the
                epoch.

        Raises:
            Refused: the owner has no such conversation, or has used it since.
            StoreError: it cannot be deleted.
        """
        await self._journal.flush()
        await self._save_late(conversation)
        found = await self._store.delete(conversation.owner, conversation.id, before)
        if not found and (before is not None or not conversation.exists):
            raise Refused(Code.NOT_FOUND)
        self._journal.mark_deleted(conversation.owner, conversation.id)
        self.forget(conversation)

    async def rename(self, owner: str, name: str, title: str, sender: Watcher) -> int:
        """Change the title of a conversation, and notify its other watchers.

        Args:
            owner: the owner of the conversation.
            name: the id of the conversation.
            title: the new title.
            sender: the watcher that is not notified.

        Returns:
            The number of notified watchers.

        Raises:
            Refused: the owner has no such conversation.
            StoreError: the title cannot be saved.
        """
        async with self.pin(owner, name) as conversation:
            conversation.renamed = True
            await self._journal.flush()
            if not await self._store.rename(owner, name, title):
                raise Refused(Code.NOT_FOUND)
            others = [watcher for watcher in conversation.watchers if watcher is not sender]
            for watcher in others:
                watcher.renamed(conversation, title)
            if self.elsewhere is not None:
                self.elsewhere.renamed(owner, name, title)
            return len(others)

    async def lacks_title(self, owner: str, name: str, made: str) -> bool:
        """Return whether a conversation still has the title that the server made.

        Args:
            owner: the owner of the conversation.
            name: the id of the conversation.
            made: the title that the server made.

        Raises:
            Refused: the conversation was deleted.
            StoreError: the title cannot be read.
        """
        async with self.pin(owner, name) as conversation:
            return await self._has_title(conversation, made)

    async def _has_title(self, conversation: Conversation, title: str) -> bool:
        await self._journal.flush()
        stored = await self._store.load(conversation.owner, conversation.id, limit=1, size=1)
        if stored is None or stored.title != title:
            return False
        return not (conversation.renamed or conversation.deleted)

    async def entitle(self, owner: str, name: str, title: str, replaced: str) -> None:
        """Replace a title that the server made, and notify all watchers.

        A title that a client gave stays, even if the client gives it during this call.

        Args:
            owner: the owner of the conversation.
            name: the id of the conversation.
            title: the new title.
            replaced: the title that the server made.

        Raises:
            Refused: the conversation was deleted.
            StoreError: the title cannot be saved.
        """
        async with self.pin(owner, name) as conversation:
            if not await self._has_title(conversation, replaced):
                return
            if await self._store.rename(owner, name, title) and not conversation.renamed:
                for watcher in tuple(conversation.watchers):
                    watcher.renamed(conversation, title)
                if self.elsewhere is not None:
                    self.elsewhere.renamed(owner, name, title)
