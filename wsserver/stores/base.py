"""What a store is: where conversations and logs last."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.generation import Thinking
from wsserver.protocol import Error, Prompt, Terminal

__all__ = [
    "Entry",
    "Header",
    "Store",
    "StoredConversation",
    "StoredGeneration",
    "Summary",
    "Turn",
    "day_of",
    "partial",
    "text_of",
    "title_of",
    "tokens_of",
]

TITLE_LENGTH = 60  # characters of a title that is made from a prompt
MOST_TOKENS = 10**12  # that one reply is counted as, so that no model's mistake is too large


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a generation when it begins. ``began`` is in seconds since the epoch."""

    id: str
    owner: str
    conversation: str | None
    prompt: Prompt
    model: str
    began: float = field(default_factory=time.time)
    retry_of: str | None = None  # the id of the turn in whose place this one stands


@dataclass(frozen=True, slots=True)
class Entry:
    """What is new of one generation: its header, the pieces after a number, its terminal.

    ``text`` is all of its text, joined, and comes with the terminal. So does ``unsaid``: the
    prompt was taken back before the model was asked, and is no turn of the conversation.
    """

    header: Header
    new: bool = False
    after: int = 0
    pieces: Sequence[str] = ()
    terminal: Terminal | None = None
    text: str | None = None
    unsaid: bool = False


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A generation as it was saved. No ``terminal``: its process died, or it still runs."""

    header: Header
    pieces: list[str]
    terminal: Terminal | None


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and its reply. ``number`` counts from 1 in a conversation, ``id`` is the reply's."""

    number: int
    id: str
    prompt: str
    text: str
    partial: str | None


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation as it was saved, with some of its turns, oldest first."""

    id: str
    owner: str
    title: str
    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list. Times are in seconds since the epoch."""

    id: str
    title: str
    created: float
    updated: float


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

        What is new of a generation that was deleted is dropped. Its tokens are not: they are
        added to its owner's account once, with the first terminal that is saved of it.
        """
        ...

    async def find(self, generation: str, owner: str, since: float) -> StoredGeneration | None:
        """Return an owner's latest generation of that id, unless it ended before a time."""
        ...

    async def load(
        self, conversation: str, owner: str, limit: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with those before a number.

        Args:
            conversation: its id.
            owner: whose.
            limit: how many turns at most.
            before: the number of the turn before which they end; None for the end.
        """
        ...

    async def list(
        self, owner: str, limit: int, before: tuple[float, str] | None
    ) -> Sequence[Summary]:
        """Return an owner's conversations, newest first, those after ``before`` in that order.

        Args:
            owner: whose.
            limit: how many at most.
            before: ``(updated, id)`` of the last one that is known already.
        """
        ...

    async def rename(self, conversation: str, owner: str, title: str) -> bool:
        """Give a conversation another title; False if the owner has none of that id."""
        ...

    async def delete(self, conversation: str, owner: str) -> bool:
        """Delete a conversation and all in it; False if the owner has none of that id."""
        ...

    async def spent(self, owner: str, day: int) -> int:
        """Return the tokens of an owner's replies that ended on a day, deleted ones too.

        It is known of today and yesterday at least. See :func:`tokens_of` and :func:`day_of`.
        """
        ...

    async def purge(self, until: float) -> None:
        """Delete generations outside of conversations that ended before a time, or some of them.

        Accounts of days that nobody asks for any more are deleted too.
        """
        ...


def tokens_of(terminal: Terminal) -> int:
    """Return what a reply cost, but for what was read from the cache, which costs a tenth."""
    usage = terminal.usage
    if usage is None:
        return 0
    asked = usage.input_tokens + (usage.cache_creation_input_tokens or 0)
    return min(asked + usage.output_tokens, MOST_TOKENS)


def day_of(seconds: float) -> int:
    """Return the day, in UTC and since the epoch, of a time in seconds since the epoch."""
    return int(seconds // 86400)


def text_of(pieces: Sequence[str]) -> str:
    """Join the pieces that are text, and not thinking."""
    return "".join(piece for piece in pieces if type(piece) is not Thinking)


def partial(terminal: Terminal | None) -> str | None:
    """Say why a reply is not whole: an error's code, or who stopped it. None where it is whole."""
    if terminal is None:
        return "interrupted"
    return str(terminal.code) if isinstance(terminal, Error) else terminal.by


def title_of(prompt: Prompt) -> str:
    """Make a conversation's title from its first prompt: one line, cut where a word ends."""
    text = " ".join((prompt.prompt or "").split())
    if len(text) <= TITLE_LENGTH:
        return text
    space = text.rfind(" ", TITLE_LENGTH // 2, TITLE_LENGTH)
    return text[: space if space >= 0 else TITLE_LENGTH - 1] + "…"
