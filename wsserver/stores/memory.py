"""The store that lasts as long as its process."""

import bisect
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from wsserver.protocol import Terminal
from wsserver.stores.base import (
    TRACE_KEPT,
    TRACES,
    Entry,
    Forgotten,
    Header,
    Packed,
    StoredConversation,
    StoredGeneration,
    Summary,
    Turn,
    day_of,
    partial,
    text_of,
    title_of,
    tokens_of,
)

__all__ = ["MemoryStore"]


@dataclass(slots=True)
class _Generation:
    header: Header
    number: int = 0  # of its turn, from 1; 0 outside of conversations
    pieces: list[str] = field(default_factory=list)  # until it has ended
    packed: Packed | None = None  # from then on
    terminal: Terminal | None = None
    ended: float | None = None
    hidden: str | None = None  # why it is not in the history: replaced, unsaid

    def said(self) -> list[str]:
        """Return its pieces."""
        return list(self.pieces) if self.packed is None else self.packed.pieces()

    def turn(self) -> Turn:
        """Return it as a turn."""
        return Turn(
            self.number,
            self.header.id,
            self.header.prompt.prompt or "",
            text_of(self.pieces) if self.packed is None else self.packed.text,
            partial(self.terminal),
        )


@dataclass(slots=True)
class _Conversation:
    id: str
    owner: str
    title: str
    created: float
    updated: float
    place: int = 0
    generations: list[_Generation] = field(default_factory=list)  # by number

    def summary(self) -> Summary:
        """Return it as an item of a list."""
        return Summary(self.id, self.title, self.created, self.updated, self.place)


@dataclass(slots=True)
class _Day:
    spent: Counter[str] = field(default_factory=Counter)  # by owner
    counted: set[tuple[str, str, float]] = field(default_factory=set)  # owner, id, and when begun


class MemoryStore:
    """Keeps everything in dictionaries.

    Args:
        conversations: how many are kept; the one idle for longest is dropped first.
    """

    def __init__(self, conversations: int = 10_000) -> None:
        self._limit = conversations
        # By owner and id, the least recently used first.
        self._conversations: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()
        self._places: dict[str, list[_Conversation]] = {}  # by owner, in the order of use
        # By owner and id, which may come again, then by when they began; the latest is the last.
        self._generations: dict[tuple[str, str], dict[float, _Generation]] = {}
        # Those outside of conversations that have ended, the first to end first.
        self._outside: OrderedDict[tuple[str, str, float], float] = OrderedDict()
        self._traces: dict[str, OrderedDict[str, float]] = {}  # by owner, the oldest first
        self._days: dict[int, _Day] = {}

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all of it."""
        now = time.time()
        for entry in entries:
            header, terminal = entry.header, entry.terminal
            if terminal is not None:
                self._count(header, terminal, day_of(now))
            generation = self._generations.get((header.owner, header.id), {}).get(header.began)
            if generation is None:
                if not entry.new:
                    continue  # it was deleted meanwhile
                generation = self._begin(header, now)
            if generation.terminal is None:
                generation.pieces[entry.after : entry.after + len(entry.pieces)] = entry.pieces
                if terminal is not None:
                    self._end(generation, terminal, now, unsaid=entry.unsaid)
            if header.conversation is not None:
                key = header.owner, header.conversation
                self._conversations.move_to_end(key)
                if entry.new or terminal is not None:
                    self._use(self._conversations[key], now)

    def _count(self, header: Header, terminal: Terminal, today: int) -> None:
        key = header.owner, header.id, header.began
        if not any(key in day.counted for day in self._days.values()):
            day = self._days.setdefault(today, _Day())
            day.counted.add(key)
            day.spent[header.owner] += tokens_of(terminal)

    def _begin(self, header: Header, now: float) -> _Generation:
        generation = _Generation(header)
        if header.conversation is not None:
            conversation = self._conversations.get((header.owner, header.conversation))
            if conversation is None:
                conversation = self._add(header.conversation, header, now)
            if header.retry_of is not None:
                self._hide(conversation, header.retry_of, None, "replaced")
            conversation.generations.append(generation)
            generation.number = len(conversation.generations)
        self._generations.setdefault((header.owner, header.id), {})[header.began] = generation
        return generation

    def _end(
        self, generation: _Generation, terminal: Terminal, now: float, *, unsaid: bool
    ) -> None:
        header = generation.header
        generation.terminal, generation.ended = terminal, now
        generation.packed, generation.pieces = Packed.of(generation.pieces), []
        if header.conversation is None:
            self._outside[header.owner, header.id, header.began] = now
        elif unsaid:
            generation.hidden = "unsaid"
            if header.retry_of is not None:
                conversation = self._conversations[header.owner, header.conversation]
                self._hide(conversation, header.retry_of, "replaced", None)

    def _hide(
        self, conversation: _Conversation, name: str, was: str | None, now: str | None
    ) -> None:
        """Change why the generations of an id are hidden in a conversation."""
        for generation in self._generations.get((conversation.owner, name), {}).values():
            if generation.header.conversation == conversation.id and generation.hidden == was:
                generation.hidden = now

    def _add(self, name: str, header: Header, now: float) -> _Conversation:
        conversation = _Conversation(name, header.owner, title_of(header.prompt), now, now)
        self._conversations[header.owner, name] = conversation
        self._use(conversation, now)
        if len(self._conversations) > self._limit:
            self._drop(next(iter(self._conversations.values())))
        return conversation

    def _use(self, conversation: _Conversation, now: float) -> None:
        """Put a conversation in front of its owner's others."""
        conversation.updated = max(conversation.updated, now)
        places = self._places.setdefault(conversation.owner, [])
        if not places or places[-1] is not conversation:
            if conversation.place:
                del places[bisect.bisect_left(places, conversation.place, key=_place)]
            conversation.place = places[-1].place + 1 if places else max(1, conversation.place)
            places.append(conversation)

    def _drop(self, conversation: _Conversation) -> None:
        """Delete a conversation and all in it."""
        owner = conversation.owner
        del self._conversations[owner, conversation.id]
        places = self._places[owner]
        del places[bisect.bisect_left(places, conversation.place, key=_place)]
        if not places:
            del self._places[owner]
        for generation in conversation.generations:
            self._forget(generation.header)

    def _forget(self, header: Header) -> None:
        """Delete a generation, and leave a trace."""
        same = self._generations[header.owner, header.id]
        del same[header.began]
        if not same:
            del self._generations[header.owner, header.id]
        traces = self._traces.setdefault(header.owner, OrderedDict())
        traces[header.id] = time.time()
        traces.move_to_end(header.id)
        if len(traces) > TRACES:
            traces.popitem(last=False)

    async def find(self, generation: str, owner: str) -> StoredGeneration | Forgotten | None:
        """Return an owner's latest generation of that id, or its trace."""
        same = self._generations.get((owner, generation))
        if same is not None:
            latest = same[next(reversed(same))]
            return StoredGeneration(latest.header, latest.said(), latest.terminal)
        traces = self._traces.get(owner)
        when = None if traces is None else traces.get(generation)
        return None if when is None else Forgotten(when)

    async def load(
        self, conversation: str, owner: str, *, limit: int, size: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return None
        end = len(found.generations) if before is None else max(0, before - 1)
        turns: list[Turn] = []
        older = False
        for generation in reversed(found.generations[:end]):
            if generation.hidden is not None:
                continue
            if len(turns) == limit:
                older = True
                break
            turn = generation.turn()
            size -= len(turn.prompt.encode()) + len(turn.text.encode())
            if size < 0 and turns:
                older = True
                break
            turns.append(turn)
        return StoredConversation(conversation, owner, found.title, turns[::-1], older)

    async def list(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, the one used last first."""
        places = self._places.get(owner, [])
        end = len(places)
        if before is not None:
            end = bisect.bisect_left(places, before, key=_place)
        return [found.summary() for found in reversed(places[max(0, end - limit) : end])]

    async def rename(self, conversation: str, owner: str, title: str) -> bool:
        """Give a conversation another title."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return False
        found.title = title
        return True

    async def delete(self, conversation: str, owner: str) -> bool:
        """Delete a conversation and all in it."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return False
        self._drop(found)
        return True

    async def spent(self, owner: str, day: int) -> int:
        """Return the tokens of an owner's replies that ended on a day."""
        found = self._days.get(day)
        return 0 if found is None else found.spent[owner]

    async def purge(self, until: float) -> None:
        """Delete generations outside of conversations that ended before a time.

        Accounts are kept for today and yesterday.
        """
        now = time.time()
        yesterday = day_of(now) - 1
        self._days = {day: account for day, account in self._days.items() if day >= yesterday}
        while self._outside and next(iter(self._outside.values())) < until:
            (owner, name, began), _ = self._outside.popitem(last=False)
            self._forget(self._generations[owner, name][began].header)
        for owner, traces in list(self._traces.items()):
            while traces and next(iter(traces.values())) < now - TRACE_KEPT:
                traces.popitem(last=False)
            if not traces:
                del self._traces[owner]


_place = attrgetter("place")
