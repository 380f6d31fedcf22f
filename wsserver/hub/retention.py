"""The generations that clients can find by id: live ones, ended ones for a while, stored ones."""

import asyncio
from collections.abc import Callable, Iterator

from wsserver.errors import Code, Refused
from wsserver.hub.accounts import Accounts
from wsserver.hub.elsewhere import Elsewhere
from wsserver.hub.endings import restored
from wsserver.hub.journal import Journal
from wsserver.hub.live import Generation
from wsserver.limits import CACHE, Account, Memory, memory_size
from wsserver.settings import Settings
from wsserver.stores.base import Forgotten, Store, StoredGeneration

KEPT_PER_REPLY = 4096  # bytes of an ended generation besides its texts
POINTER = 8  # bytes of a place in a list


class Retention:
    """Finds generations by owner and id, and keeps the ended ones for the replay time.

    The ended generations use at most ``replay_size`` bytes, and no memory that data in use needs:
    the oldest ones are dropped first. The store still has them.

    Args:
        store: has the ended generations that are not in memory.
        journal: has the ended generations that could not be saved yet.
        accounts: pay for reads from the store.
        settings: the replay time and the replay size.
        memory: counts the bytes of the ended generations as a cache.
    """

    def __init__(
        self,
        store: Store,
        journal: Journal,
        accounts: Accounts,
        settings: Settings,
        memory: Memory,
    ) -> None:
        self.size = 0  # bytes of the ended generations in memory
        self._store = store
        self._journal = journal
        self._accounts = accounts
        self._settings = settings
        self._memory = memory
        self._loop = asyncio.get_running_loop()
        self._known: dict[tuple[str, str], Generation] = {}  # by owner and id
        self._ended: dict[Generation, float] = {}  # until when each is kept, the oldest first
        self._conversations: dict[tuple[str, str], set[Generation]] = {}  # the ended ones of each
        self._reads: dict[str, set[object]] = {}  # by owner: reads of the store under way
        self._timer: asyncio.TimerHandle | None = None
        self.elsewhere: Elsewhere | None = None  # the other nodes
        memory.shed_by(self._shed)

    def __iter__(self) -> Iterator[Generation]:
        return iter(tuple(self._known.values()))

    def known(self, owner: str, generation_id: str) -> Generation | None:
        """Return a generation that is in memory."""
        return self._known.get((owner, generation_id))

    async def find(self, owner: str, generation_id: str, account: Account) -> Generation | None:
        """Return a generation from memory or from the store.

        The account pays for what is read from the store.

        Raises:
            Refused: the generation was deleted or has expired, or the account is over its limit of
                reads.
            StoreError: the store failed.
        """
        known = self.known(owner, generation_id)
        if known is not None:
            return known
        self._accounts.check_reads(account)
        # The store does not have the generations that the journal still has to save.
        stored: StoredGeneration | Forgotten | None = self._journal.find(owner, generation_id)
        if stored is None:
            stored = await self._read(owner, generation_id)
            stored = self._journal.find(owner, generation_id) or stored
        if stored is None and self.elsewhere is not None:  # it may have begun just now
            return await self.elsewhere.find(owner, generation_id, None)
        known = self.known(owner, generation_id)  # another request may have been quicker
        if known is not None or stored is None:
            return known
        if isinstance(stored, Forgotten):
            raise Refused(Code.FORGOTTEN)
        if stored.node is not None and self.elsewhere is not None:
            running = await self.elsewhere.find(owner, generation_id, stored.node)
            if running is not None:
                return running
            again = await self._read(owner, generation_id)  # it may have ended meanwhile
            known = self.known(owner, generation_id)
            if known is not None or not isinstance(again, StoredGeneration):
                return known
            if again.node is not None:  # the others have not ended the replies of a dead node yet
                raise Refused(Code.UNAVAILABLE)
            stored = again
        generation = restored(stored)
        self.retain(generation)
        self._accounts.charge_reads(account, generation.size)
        return generation

    async def _read(self, owner: str, generation_id: str) -> StoredGeneration | Forgotten | None:
        """Read a generation from the store. Read again if the owner deleted something during it."""
        read = object()
        while True:
            self._reads.setdefault(owner, set()).add(read)
            try:
                stored = await self._store.find(owner, generation_id)
            finally:
                under_way = self._reads.get(owner, set())
                valid = read in under_way
                under_way.discard(read)
                if not under_way:
                    self._reads.pop(owner, None)
            if valid:
                return stored

    def add(self, generation: Generation) -> None:
        """Add a generation that was just accepted."""
        self._known[generation.owner, generation.id] = generation

    def retain(self, generation: Generation) -> None:
        """Keep an ended generation in memory for the replay time, if there is memory for it."""
        self.add(generation)
        generation.size = _size(generation)
        if not self._memory.acquire(CACHE, generation.size):
            self.forget(generation)
            return
        self._ended[generation] = self._loop.time() + self._settings.replay
        self.size += generation.size
        if generation.conversation_id is not None:
            within = generation.owner, generation.conversation_id
            self._conversations.setdefault(within, set()).add(generation)
        if self._timer is None:
            self._set_timer()
        while self.size > self._settings.replay_size:
            self._drop(next(iter(self._ended)))

    def forget(self, generation: Generation) -> None:
        """Remove a generation, unless another one has its id by now."""
        key = generation.owner, generation.id
        if self._known.get(key) is generation:
            del self._known[key]

    def deleted(self, owner: str, conversation: str) -> None:
        """Forget the ended generations of a conversation that was deleted."""
        self._reads.pop(owner, None)
        for generation in tuple(self._conversations.get((owner, conversation), ())):
            self._drop(generation)

    def outdate(self, decides: Callable[[tuple[str, str]], bool]) -> None:
        """Forget the ended generations that other nodes may have deleted.

        Args:
            decides: whether this node alone decides on a conversation, by owner and id.
        """
        for within in tuple(self._conversations):
            if not (decides(within) or self._journal.has_late(*within)):
                self.deleted(*within)

    def close(self) -> None:
        """Set no more timers."""
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        oldest = next(iter(self._ended.values()))
        self._timer = self._loop.call_at(oldest, self._drop_expired)

    def _drop_expired(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._ended and next(iter(self._ended.values())) <= now:
            self._drop(next(iter(self._ended)))
        if self._ended:
            self._set_timer()

    def _shed(self, size: int) -> None:
        """Drop at least ``size`` bytes of ended generations, the oldest first."""
        while size > 0 and self._ended:
            oldest = next(iter(self._ended))
            size -= oldest.size
            self._drop(oldest)

    def _drop(self, generation: Generation) -> None:
        """Forget an ended generation and give its memory back."""
        del self._ended[generation]
        self.size -= generation.size
        self._memory.release(CACHE, generation.size)
        if generation.conversation_id is not None:
            within = generation.owner, generation.conversation_id
            others = self._conversations[within]
            others.discard(generation)
            if not others:
                del self._conversations[within]
        self.forget(generation)


def _size(generation: Generation) -> int:
    """Return the bytes of an ended generation in memory."""
    pieces = generation.log.pieces.data
    texts = sum(map(memory_size, pieces)) + generation.prompt_size
    return KEPT_PER_REPLY + POINTER * len(pieces) + texts
