"""What a store is: where conversations and logs last."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.content import Block, Message, RedactedThinking, Text, Thinking, Usage
from wsserver.errors import StoreError
from wsserver.pieces import Pieces
from wsserver.prices import Spent
from wsserver.protocol import Error, Prompt, Terminal

__all__ = [
    "TRACES",
    "TRACE_KEPT",
    "Entry",
    "Forgotten",
    "Header",
    "Held",
    "Store",
    "StoredConversation",
    "StoredGeneration",
    "Summary",
    "Turn",
    "Unsavable",
    "day_of",
    "partial",
    "title_of",
    "turn_of",
]

TITLE_LENGTH = 60  # characters of a title that is made from a prompt
TRACE_KEPT = 30 * 86_400.0  # seconds that the trace of a deleted generation is kept
TRACES = 1000  # of one owner that are kept; the oldest are dropped first


@dataclass(frozen=True, slots=True)
class Header:
    """A generation as it was accepted. ``began`` is the time of it, in seconds since the epoch.

    ``retry_of`` is the id of the generation that this one replaces in the history.
    """

    id: str
    owner: str
    conversation: str | None
    prompt: Prompt
    model: str
    began: float = field(default_factory=time.time)
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """The unsaved part of one generation: its header, the pieces after a number, its terminal.

    ``unsaid`` comes with the terminal of a prompt that never reached the model. Such a
    generation is in no history, and the generation that it was to replace is back in it.
    """

    header: Header
    new: bool = False
    after: int = 0
    pieces: Pieces = field(default_factory=Pieces)
    terminal: Terminal | None = None
    unsaid: bool = False


class Unsavable(StoreError):
    """An entry that no attempt can save, and for which the rest of its batch was not saved.

    Args:
        entry: which.
        message: why, for the log.
    """

    def __init__(self, entry: Entry, message: str) -> None:
        super().__init__(message)
        self.entry = entry


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A saved generation. Without a ``terminal`` it still runs, or its process died."""

    header: Header
    pieces: Pieces
    terminal: Terminal | None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The trace of a generation that was deleted. ``when`` is in seconds since the epoch."""

    when: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and its reply. ``number`` counts from 1 in a conversation."""

    number: int
    prompt: Message
    reply: Message

    @property
    def id(self) -> str:
        """The id of the generation."""
        return self.reply.id or ""

    @property
    def text(self) -> str:
        """The text of the reply."""
        return self.reply.text

    @property
    def partial(self) -> str | None:
        """Why the reply is not whole; None where it is."""
        return self.reply.partial

    @property
    def answered(self) -> bool:
        """Whether the reply has more than thinking and white space."""
        if self.text.strip():
            return True
        silent = (Text, Thinking, RedactedThinking)
        return any(not isinstance(block, silent) for block in self.reply.blocks)

    @property
    def size(self) -> int:
        """Characters of both messages, without thinking."""
        return self.prompt.size + self.reply.size


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A saved conversation with some of its turns, oldest first.

    ``older`` tells whether the history has turns before them.
    """

    id: str
    owner: str
    title: str
    turns: list[Turn]
    older: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list. Times are in seconds since the epoch.

    ``place`` is its place in the order of use: the one used last has its owner's largest. The
    wall clock, which can be set back, has no part in it.
    """

    id: str
    title: str
    created: float
    updated: float
    place: int


@dataclass(frozen=True, slots=True)
class Held:
    """How much an owner has in a store. Generations outside of conversations count too."""

    bytes: int
    conversations: int


class Store(Protocol):
    """Keeps conversations and generations.

    A conversation comes into being with its first generation, and its title is made from that
    one's prompt. Ids of conversations and generations are their owner's: others may have the same
    ones, and nobody can tell what others have.

    All methods raise :class:`~wsserver.errors.StoreError` when the store fails.
    """

    async def open(self) -> None:
        """Get ready.

        Raises:
            ConfigError: it cannot be used at all.
        """
        ...

    async def close(self) -> None:
        """Release what it holds. Idempotent."""
        ...

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all of it or nothing. What was saved before is not an error to save again.

        What is new of a generation that was deleted is dropped. What it cost is not: that is
        added to its owner's account once, with the first terminal that is saved of it.

        Raises:
            Unsavable: one entry is to blame; the others can be saved without it.
        """
        ...

    async def find(self, generation: str, owner: str) -> StoredGeneration | Forgotten | None:
        """Return an owner's latest generation of that id.

        Returns:
            The generation, for as long as it is stored. After it was deleted or purged, its
            trace, for :data:`TRACE_KEPT` seconds and for the :data:`TRACES` of an owner that
            were left last. None where the store never had it.
        """
        ...

    async def load(
        self, conversation: str, owner: str, *, limit: int, size: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number.

        Turns are read newest first until either bound is reached. The first one is returned
        however large it is. Replaced turns and those never said are left out.

        Args:
            conversation: its id.
            owner: whose.
            limit: how many turns at most.
            size: bytes of prompts and replies at most, about, as UTF-8.
            before: the number of the turn before which they end; None for the end.
        """
        ...

    async def list(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, the one used last first.

        Args:
            owner: whose.
            limit: how many at most.
            before: the place of the last one that is known already.
        """
        ...

    async def rename(self, conversation: str, owner: str, title: str) -> bool:
        """Give a conversation another title; False if the owner has none of that id."""
        ...

    async def delete(self, conversation: str, owner: str, before: float | None = None) -> bool:
        """Delete a conversation and all in it.

        Args:
            conversation: its id.
            owner: whose.
            before: delete it only if it was last used before this time, in seconds since the
                epoch.

        Returns:
            False if the owner has no such conversation.
        """
        ...

    async def spent(self, owner: str, day: int) -> Spent:
        """Return what an owner's replies have cost that ended on a day, deleted ones too.

        It is known of today and yesterday at least. See :func:`day_of`.
        """
        ...

    async def held(self, owner: str) -> Held:
        """Return how much an owner has here."""
        ...

    async def purge(self, until: float) -> bool:
        """Delete some generations outside of conversations that ended before a time.

        With them go some of the traces and accounts that nobody asks for any more. One call
        takes so little that it holds up nothing else.

        Returns:
            Whether there may be more to delete.
        """
        ...

    async def idle(self, before: float, limit: int) -> Sequence[tuple[str, str]]:
        """Return the owners and ids of some conversations that were last used before a time."""
        ...

    async def probe(self) -> None:
        """Try whether the store saves: write something that changes nothing."""
        ...


def day_of(seconds: float) -> int:
    """Return the day, in UTC and since the epoch, of a time in seconds since the epoch."""
    return int(seconds // 86400)


def partial(terminal: Terminal | None) -> str | None:
    """Say why a reply is not whole: an error's code, or who stopped it. None where it is whole."""
    if terminal is None:
        return "interrupted"
    return str(terminal.code) if isinstance(terminal, Error) else terminal.by


def turn_of(
    number: int,
    generation: str,
    contents: tuple[Iterable[Block], Iterable[Block]],
    terminal: Terminal | None,
    *,
    model: str,
    began: float,
    ended: float | None,
) -> Turn:
    """Make a turn of what a store has of it; ``contents`` are those of prompt and reply."""
    usage = None
    if terminal is not None and terminal.usage is not None:
        usage = Usage(**terminal.usage.model_dump(exclude_none=True))
    return Turn(
        number,
        Message("user", contents[0], id=generation, began=began),
        Message(
            "assistant",
            contents[1],
            partial(terminal),
            id=generation,
            model=model,
            usage=usage,
            began=began,
            ended=ended,
        ),
    )


def title_of(prompt: Prompt) -> str:
    """Make a conversation's title from its first prompt: one line, cut where a word ends."""
    text = "" if prompt.prompt is None else " ".join(prompt.said[0].text.split())
    if len(text) <= TITLE_LENGTH:
        return text
    space = text.rfind(" ", TITLE_LENGTH // 2, TITLE_LENGTH)
    return text[: space if space >= 0 else TITLE_LENGTH - 1] + "…"
