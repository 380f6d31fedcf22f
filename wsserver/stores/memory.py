"""The store in memory. Its content is lost when the process ends."""

import bisect
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from operator import attrgetter

from wsserver.limits import CACHE, Memory
from wsserver.pieces import Pieces
from wsserver.prices import NOTHING, Prices, Spent
from wsserver.protocol import Terminal
from wsserver.stores.base import (
    TRACE_KEPT,
    TRACES,
    Amounts,
    Entry,
    Forgotten,
    Header,
    StoredConversation,
    StoredGeneration,
    Summary,
    Turn,
    day_of,
    title_of,
    turn_of,
)
from wsserver.stores.records import Packed, content_in, dump_prompt, parse_prompt

ROOM = 268_435_456  # bytes, if the store has no shared memory account
PURGED_AT_ONCE = 1000  # generations per call, which blocks the event loop
ALL_TRACES = 100_000  # of all owners
OBJECTS = 1600  # bytes of a generation besides its texts


@dataclass(slots=True, eq=False)
class _Generation:
    """A generation. Its texts are UTF-8, as Python's strings can take four times the memory."""

    id: str
    owner: str
    conversation: str | None
    began: float
    model: str
    retry_of: str | None
    prompt: bytes  # as JSON
    number: int = 0  # of its turn, from 1; 0 outside of conversations
    pieces: Pieces = field(default_factory=Pieces)  # until it has ended
    # From then on.
    text: bytes = b""
    other: bytes = b""
    lengths: bytes | None = None
    runs: bytes = b""
    terminal: Terminal | None = None
    ended: float | None = None
    hidden: str | None = None  # why it is not in the history: replaced, withdrawn

    @classmethod
    def of(cls, header: Header) -> "_Generation":
        return cls(
            header.id,
            header.owner,
            header.conversation,
            header.began,
            header.model,
            header.retry_of,
            dump_prompt(header.prompt).encode(),
        )

    @property
    def size(self) -> int:
        """Bytes in memory. The log counts the pieces of a generation that runs."""
        texts = (self.prompt, self.text, self.other, self.lengths or b"", self.runs)
        return OBJECTS + sum(map(sys.getsizeof, texts))

    def pack(self) -> None:
        """Replace the pieces with their packed form."""
        packed = Packed.of(self.pieces)
        self.text, self.other = packed.text.encode(), packed.other.encode()
        self.lengths, self.runs = packed.lengths.encode(), (packed.runs or "").encode()
        self.pieces = Pieces()

    def packed(self) -> Packed | None:
        """Return the packed pieces; None until the generation has ended."""
        if self.lengths is None:
            return None
        return Packed(
            self.text.decode(), self.other.decode(), self.lengths.decode(), self.runs.decode()
        )

    def stored(self) -> StoredGeneration:
        """Return the generation."""
        prompt = parse_prompt(self.prompt)
        header = Header(
            self.id, self.owner, self.conversation, prompt, self.model, self.began, self.retry_of
        )
        packed = self.packed()
        pieces = self.pieces.after(0) if packed is None else packed.pieces()
        return StoredGeneration(header, pieces, self.terminal)

    def turn(self) -> Turn:
        """Return the generation as a turn."""
        packed = self.packed()
        blocks = (self.pieces if packed is None else packed).blocks()
        return turn_of(
            self.number,
            self.id,
            (content_in(self.prompt), blocks),
            self.terminal,
            model=self.model,
            began=self.began,
            ended=self.ended,
        )


@dataclass(slots=True, eq=False)
class _Conversation:
    id: str
    owner: str
    title: str
    created: float
    updated: float
    place: int = 0
    generations: list[_Generation] = field(default_factory=list)  # by number
    turns: int = 0  # the number of the last one

    def summary(self) -> Summary:
        """Return the conversation as an item of a list."""
        return Summary(self.id, self.title, self.created, self.updated, self.place)


@dataclass(slots=True)
class _Trace:
    """The trace of a deleted generation."""

    when: float
    began: float
    counted: bool  # the cost is in the account of the owner


class MemoryStore:
    """Stores conversations and generations in dictionaries, as long as there is memory.

    Args:
        conversations: the number kept; the least recently used one is dropped first.
        memory: counts the bytes. If other parts of the server need them, the least recently used
            conversation is dropped too.
        prices: the prices of the models; by default those of Claude.
    """

    def __init__(
        self,
        conversations: int = 10_000,
        memory: Memory | None = None,
        prices: Prices | None = None,
    ) -> None:
        self._prices = prices or Prices()
        self._limit = conversations
        self._memory = Memory(ROOM) if memory is None else memory
        self._memory.shed_by(self._shed)
        self._size = 0
        self._taken = 0  # acquired bytes of `_size`
        self._sizes: Counter[str] = Counter()  # by owner
        # By owner and id, the least recently used first.
        self._conversations: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()
        self._places: dict[str, list[_Conversation]] = {}  # by owner, in the order of use
        # By owner and id, which may come again, then by when they began; the latest is the last.
        self._generations: dict[tuple[str, str], dict[float, _Generation]] = {}
        self._outside: OrderedDict[_Generation, None] = OrderedDict()  # in the order of their ends
        self._traces: OrderedDict[tuple[str, str], _Trace] = OrderedDict()  # the oldest first
        self._traced: dict[str, OrderedDict[str, None]] = {}  # their ids by owner, likewise
        self._spent: dict[int, dict[str, Spent]] = {}  # by day and owner

    async def open(self) -> None:
        """Nothing to do."""

    def now(self) -> float:
        """Return the time of this machine, in seconds since the epoch."""
        return time.time()

    async def close(self) -> None:
        """Nothing to do."""

    async def probe(self) -> None:
        """Nothing to do."""

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all entries."""
        now = self.now()
        for entry in entries:
            header, terminal = entry.header, entry.terminal
            generation = self._generations.get((header.owner, header.id), {}).get(header.began)
            if generation is None:
                if not entry.new:  # the generation was deleted
                    self._count_deleted(header, terminal, now)
                    continue
                generation = self._begin(header, now)
            if generation.terminal is None:
                generation.pieces.replace(entry.after, entry.pieces)
                if terminal is not None:
                    self._save_end(generation, terminal, now, withdrawn=entry.withdrawn)
            if header.conversation is not None:
                key = header.owner, header.conversation
                self._conversations.move_to_end(key)
                if entry.new or terminal is not None:
                    self._use(self._conversations[key], now)
        self._acquire_memory()

    def _count(self, owner: str, model: str, terminal: Terminal, now: float) -> None:
        day = self._spent.setdefault(day_of(now), {})
        day[owner] = self._prices.of(model).spent(terminal.usage).plus(day.get(owner, NOTHING))

    def _count_deleted(self, header: Header, terminal: Terminal | None, now: float) -> None:
        """Count the cost of a reply that ended after it was deleted."""
        trace = self._traces.get((header.owner, header.id))
        if terminal is None or trace is None or trace.began != header.began or trace.counted:
            return
        trace.counted = True
        self._count(header.owner, header.model, terminal, now)

    def _begin(self, header: Header, now: float) -> _Generation:
        generation = _Generation.of(header)
        if header.conversation is not None:
            conversation = self._conversations.get((header.owner, header.conversation))
            if conversation is None:
                conversation = self._add(header.conversation, header, now)
            if header.retry_of is not None:
                self._hide(conversation, header.retry_of, None, "replaced")
            conversation.turns += 1
            generation.number = conversation.turns
            conversation.generations.append(generation)
        self._generations.setdefault((header.owner, header.id), {})[header.began] = generation
        self._grow(generation.owner, generation.size)
        return generation

    def _save_end(
        self, generation: _Generation, terminal: Terminal, now: float, *, withdrawn: bool
    ) -> None:
        trace = self._traces.get((generation.owner, generation.id))
        if trace is None or trace.began != generation.began or not trace.counted:
            self._count(generation.owner, generation.model, terminal, now)
        before = generation.size
        generation.terminal, generation.ended = terminal, now
        generation.pack()
        self._grow(generation.owner, generation.size - before)
        if generation.conversation is None:
            self._outside[generation] = None
        elif withdrawn:
            generation.hidden = "unsaid"
            if generation.retry_of is not None:
                conversation = self._conversations[generation.owner, generation.conversation]
                self._hide(conversation, generation.retry_of, "replaced", None)

    def _hide(
        self, conversation: _Conversation, name: str, was: str | None, now: str | None
    ) -> None:
        """Change the reason why the generations of an id are hidden in a conversation."""
        for generation in self._generations.get((conversation.owner, name), {}).values():
            if generation.conversation == conversation.id and generation.hidden == was:
                generation.hidden = now

    def _add(self, name: str, header: Header, now: float) -> _Conversation:
        conversation = _Conversation(name, header.owner, title_of(header.prompt), now, now)
        self._conversations[header.owner, name] = conversation
        self._use(conversation, now)
        if len(self._conversations) > self._limit:
            self._drop(next(iter(self._conversations.values())))
        return conversation

    def _use(self, conversation: _Conversation, now: float) -> None:
        """Note a use: the conversation becomes the newest of its owner."""
        conversation.updated = max(conversation.updated, now)
        places = self._places.setdefault(conversation.owner, [])
        if not places or places[-1] is not conversation:
            if conversation.place:
                del places[bisect.bisect_left(places, conversation.place, key=_place)]
            conversation.place = places[-1].place + 1 if places else max(1, conversation.place)
            places.append(conversation)

    def _grow(self, owner: str, size: int) -> None:
        self._size += size
        self._sizes[owner] += size
        if not self._sizes[owner]:
            del self._sizes[owner]

    def _acquire_memory(self) -> None:
        """Acquire memory for added content; drop old content if there is not enough."""
        while (more := self._size - self._taken) > 0:
            if self._memory.acquire(CACHE, more):  # this call may have dropped old content here
                self._taken += more
            elif not self._drop_one():
                return
        self._memory.release(CACHE, -more)
        self._taken += more

    def _shed(self, size: int) -> None:
        """Drop at least ``size`` bytes of old content, or all content."""
        before = self._size
        while before - self._size < size and self._drop_one():
            pass
        dropped = min(before - self._size, self._taken)
        self._memory.release(CACHE, dropped)
        self._taken -= dropped

    def _drop_one(self) -> bool:
        """Drop the oldest content; return False if there is none.

        Replies outside of conversations are dropped first, because they are kept only for minutes.
        Then the least recently used conversation is dropped, or the oldest turn of the only one.
        """
        if self._outside:
            generation, _ = self._outside.popitem(last=False)
            self._forget(generation)
            return True
        if len(self._conversations) > 1:
            self._drop(next(iter(self._conversations.values())))
            return True
        for conversation in self._conversations.values():
            if len(conversation.generations) > 1:
                self._forget(conversation.generations.pop(0))
                return True
        return False

    def _drop(self, conversation: _Conversation) -> None:
        """Delete a conversation and its generations."""
        owner = conversation.owner
        del self._conversations[owner, conversation.id]
        places = self._places[owner]
        del places[bisect.bisect_left(places, conversation.place, key=_place)]
        if not places:
            del self._places[owner]
        for generation in conversation.generations:
            self._forget(generation)

    def _forget(self, generation: _Generation) -> None:
        """Delete a generation, and leave a trace."""
        owner, name = key = generation.owner, generation.id
        same = self._generations[key]
        del same[generation.began]
        if not same:
            del self._generations[key]
        self._grow(owner, -generation.size)
        self._drop_trace(key)
        counted = generation.terminal is not None
        self._traces[key] = _Trace(self.now(), generation.began, counted)
        mine = self._traced.setdefault(owner, OrderedDict())
        mine[name] = None
        if len(mine) > TRACES:
            self._drop_trace((owner, next(iter(mine))))
        if len(self._traces) > ALL_TRACES:
            self._drop_trace(next(iter(self._traces)))

    def _drop_trace(self, key: tuple[str, str]) -> None:
        if self._traces.pop(key, None) is not None:
            owner, name = key
            del self._traced[owner][name]
            if not self._traced[owner]:
                del self._traced[owner]

    async def find(self, owner: str, generation: str) -> StoredGeneration | Forgotten | None:
        """Return an owner's latest generation of that id, or its trace."""
        same = self._generations.get((owner, generation))
        if same is not None:
            return same[next(reversed(same))].stored()
        trace = self._traces.get((owner, generation))
        return None if trace is None else Forgotten(trace.when)

    async def load(
        self, owner: str, conversation: str, *, limit: int, size: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return None
        turns: list[Turn] = []
        older = False
        for generation in _newest(found.generations, before):
            size -= len(generation.prompt) + len(generation.text) + len(generation.other)
            older = len(turns) == limit or (size < 0 and bool(turns))
            if older:
                break
            turns.append(generation.turn())
        return StoredConversation(conversation, owner, found.title, turns[::-1], older)

    async def list(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, the one used last first."""
        places = self._places.get(owner, [])
        end = len(places)
        if before is not None:
            end = bisect.bisect_left(places, before, key=_place)
        return [found.summary() for found in reversed(places[max(0, end - limit) : end])]

    async def rename(self, owner: str, conversation: str, title: str) -> bool:
        """Change the title of a conversation."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return False
        found.title = title
        return True

    async def delete(self, owner: str, conversation: str, before: float | None = None) -> bool:
        """Delete a conversation and its generations."""
        found = self._conversations.get((owner, conversation))
        if found is None or (before is not None and found.updated >= before):
            return False
        self._drop(found)
        self._acquire_memory()
        return True

    async def spent(self, owner: str, day: int) -> Spent:
        """Return the cost of an owner's replies that ended on a day."""
        return self._spent.get(day, {}).get(owner, NOTHING)

    async def amounts(self, owner: str) -> Amounts:
        """Return how much an owner has stored."""
        return Amounts(self._sizes[owner], len(self._places.get(owner, ())))

    async def idle(self, before: float, limit: int) -> Sequence[tuple[str, str]]:
        """Return the owners and ids of some conversations that were last used before a time."""
        old = takewhile(lambda item: item[1].updated < before, self._conversations.items())
        return [key for key, _ in islice(old, limit)]

    async def purge(self, until: float) -> bool:
        """Delete some expired generations and traces. Spending is kept for two days."""
        now = self.now()
        yesterday = day_of(now) - 1
        self._spent = {day: spent for day, spent in self._spent.items() if day >= yesterday}
        ended = takewhile(lambda g: g.ended is not None and g.ended < until, self._outside)
        purged = list(islice(ended, PURGED_AT_ONCE))
        for generation in purged:
            del self._outside[generation]
            self._forget(generation)
        self._acquire_memory()
        old = takewhile(lambda item: item[1].when < now - TRACE_KEPT, self._traces.items())
        dropped = [key for key, _ in islice(old, PURGED_AT_ONCE)]
        for key in dropped:
            self._drop_trace(key)
        return PURGED_AT_ONCE in {len(purged), len(dropped)}


def _newest(generations: Sequence[_Generation], before: int | None) -> Iterator[_Generation]:
    """Yield the generations that are in the history, newest first."""
    end = len(generations)
    if before is not None:
        end = bisect.bisect_left(generations, before, key=attrgetter("number"))
    for index in range(end - 1, -1, -1):
        if generations[index].hidden is None:
            yield generations[index]


_place = attrgetter("place")
