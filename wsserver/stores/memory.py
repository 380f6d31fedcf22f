"""The store that lasts as long as its process."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from wsserver.protocol import Terminal
from wsserver.stores.base import (
    Entry,
    Header,
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
    pieces: list[str] = field(default_factory=list)
    terminal: Terminal | None = None
    ended: float | None = None


@dataclass(slots=True)
class _Conversation:
    summary: Summary
    generations: list[_Generation] = field(default_factory=list)


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
        self._conversations: dict[tuple[str, str], _Conversation] = {}
        # By owner and id, which may come again, then by when they began; the latest is the last.
        self._generations: dict[tuple[str, str], dict[float, _Generation]] = {}
        self._days: dict[int, _Day] = {}

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all of it."""
        now = time.time()
        for entry in entries:
            header = entry.header
            if entry.terminal is not None:
                self._count(header, entry.terminal, day_of(now))
            generation = self._generations.get((header.owner, header.id), {}).get(header.began)
            if generation is None:
                if not entry.new:
                    continue  # it was deleted meanwhile
                generation = self._begin(header, now)
            generation.pieces[entry.after : entry.after + len(entry.pieces)] = entry.pieces
            if entry.terminal is not None:
                generation.terminal, generation.ended = entry.terminal, now
            name = generation.header.conversation
            if name is not None:
                key = header.owner, name
                conversation = self._conversations[key] = self._conversations.pop(key)
                if entry.new or entry.terminal is not None:
                    conversation.summary = replace(conversation.summary, updated=now)

    def _count(self, header: Header, terminal: Terminal, today: int) -> None:
        key = header.owner, header.id, header.began
        if not any(key in day.counted for day in self._days.values()):
            day = self._days.setdefault(today, _Day())
            day.counted.add(key)
            day.spent[header.owner] += tokens_of(terminal)

    def _begin(self, header: Header, now: float) -> _Generation:
        generation = _Generation(header)
        same = self._generations.setdefault((header.owner, header.id), {})
        same[header.began] = generation
        if header.conversation is not None:
            key = header.owner, header.conversation
            conversation = self._conversations.get(key)
            if conversation is None:
                summary = Summary(header.conversation, title_of(header.prompt), now, now)
                conversation = self._conversations[key] = _Conversation(summary)
                if len(self._conversations) > self._limit:
                    self._drop(next(iter(self._conversations)))
            conversation.generations.append(generation)
        return generation

    def _drop(self, key: tuple[str, str]) -> None:
        for generation in self._conversations.pop(key).generations:
            self._forget(generation.header)

    def _forget(self, header: Header) -> None:
        same = self._generations[header.owner, header.id]
        del same[header.began]
        if not same:
            del self._generations[header.owner, header.id]

    async def find(self, generation: str, owner: str, since: float) -> StoredGeneration | None:
        """Return an owner's latest generation of that id, unless it ended before a time."""
        same = self._generations.get((owner, generation))
        if same is None:
            return None
        latest = same[next(reversed(same))]
        if latest.ended is not None and latest.ended < since:
            return None
        return StoredGeneration(latest.header, list(latest.pieces), latest.terminal)

    async def load(
        self, conversation: str, owner: str, limit: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return None
        end = len(found.generations) if before is None else max(0, before - 1)
        numbered = list(enumerate(found.generations, start=1))[:end]
        turns = [
            Turn(
                number,
                generation.header.id,
                generation.header.prompt.prompt or "",
                text_of(generation.pieces),
                partial(generation.terminal),
            )
            for number, generation in numbered[max(0, len(numbered) - limit) :]
        ]
        return StoredConversation(conversation, owner, found.summary.title, turns)

    async def list(
        self, owner: str, limit: int, before: tuple[float, str] | None
    ) -> Sequence[Summary]:
        """Return an owner's conversations, newest first."""
        mine = (c.summary for (whose, _), c in self._conversations.items() if whose == owner)
        ordered = sorted(mine, key=lambda summary: (summary.updated, summary.id), reverse=True)
        if before is not None:
            ordered = [summary for summary in ordered if (summary.updated, summary.id) < before]
        return ordered[:limit]

    async def rename(self, conversation: str, owner: str, title: str) -> bool:
        """Give a conversation another title."""
        found = self._conversations.get((owner, conversation))
        if found is None:
            return False
        found.summary = replace(found.summary, title=title)
        return True

    async def delete(self, conversation: str, owner: str) -> bool:
        """Delete a conversation and all in it."""
        if (owner, conversation) not in self._conversations:
            return False
        self._drop((owner, conversation))
        return True

    async def spent(self, owner: str, day: int) -> int:
        """Return the tokens of an owner's replies that ended on a day."""
        found = self._days.get(day)
        return 0 if found is None else found.spent[owner]

    async def purge(self, until: float) -> None:
        """Delete generations outside of conversations that ended before a time.

        Of those in conversations only the text is kept, in one piece. Accounts are kept for today
        and yesterday.
        """
        yesterday = day_of(time.time()) - 1
        self._days = {day: account for day, account in self._days.items() if day >= yesterday}
        for same in list(self._generations.values()):
            for generation in list(same.values()):
                if generation.ended is None or generation.ended >= until:
                    continue
                if generation.header.conversation is None:
                    self._forget(generation.header)
                elif len(generation.pieces) > 1:
                    generation.pieces = [text_of(generation.pieces)]
