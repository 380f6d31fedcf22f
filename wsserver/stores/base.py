"""The interface of a store, and the types of its arguments and results."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.content import Block, Message, RedactedThinking, Text, Thinking, memory_of
from wsserver.errors import StoreError
from wsserver.pieces import Pieces
from wsserver.prices import NOTHING, Spent
from wsserver.protocol import Error, Prompt, Terminal

TITLE_LENGTH = 60  # characters of a title made from a prompt
TRACE_KEPT = 30 * 86_400.0  # seconds for which the trace of a deleted generation is kept
TRACES = 1000  # traces of one owner; the oldest are dropped first


@dataclass(frozen=True, slots=True)
class Header:
    """The accepted prompt of a generation.

    ``began`` is the time of acceptance in seconds since the epoch. ``retry_of`` is the id of the
    generation that this one replaces in the history.
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
    """The unsaved part of a generation: header, pieces after the first ``after``, terminal.

    ``new``: the store does not have the generation yet. ``withdrawn``: the prompt was stopped
    before the model was called. Such a generation is in no history, and the generation that its
    ``retry_of`` names is back in the history.
    """

    header: Header
    new: bool = False
    after: int = 0
    pieces: Pieces = field(default_factory=Pieces)
    terminal: Terminal | None = None
    withdrawn: bool = False


class Fenced(StoreError):
    """The cluster holds this node for dead: it did not renew its leases in time."""


class Unsavable(StoreError):
    """An entry can never be saved. The rest of its batch was not saved."""

    def __init__(self, entry: Entry, message: str) -> None:
        super().__init__(message)
        self.entry = entry


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A saved generation. It has no ``terminal`` while it runs, or if its process died.

    ``node``: the node of the cluster that runs it; None if none does.
    """

    header: Header
    pieces: Pieces
    terminal: Terminal | None
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The trace of a generation that was deleted. ``when`` is in seconds since the epoch."""

    when: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and its reply."""

    number: int  # counts from 1 in a conversation
    prompt: Message
    reply: Message
    # Each request to the model asks for these of every turn.
    # Characters of both messages, without thinking.
    size: int = field(init=False, compare=False, repr=False)
    # Bytes of memory that both messages take.
    memory: int = field(init=False, compare=False, repr=False)
    # Whether the reply has more than thinking and white space.
    answered: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "size", self.prompt.size + self.reply.size)
        put(self, "memory", memory_of(self.prompt) + memory_of(self.reply))
        put(self, "answered", _has_content(self.reply))

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
        """Why the reply is incomplete; None if it is complete."""
        return self.reply.partial


def _has_content(reply: Message) -> bool:
    """Whether a reply has more than thinking and white space."""
    if reply.text.strip():
        return True
    silent = (Text, Thinking, RedactedThinking)
    return any(not isinstance(block, silent) for block in reply.blocks)


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A saved conversation and some of its turns, oldest first.

    ``older`` tells whether the history has turns before these.
    """

    id: str
    owner: str
    title: str
    turns: list[Turn]
    older: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list. Times are in seconds since the epoch.

    ``place`` is a number that grows with each use: the conversation used last has the owner's
    largest. It does not depend on the clock, which can be set back.
    """

    id: str
    title: str
    created: float
    updated: float
    place: int


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much an owner has stored, including generations outside of conversations."""

    bytes: int
    conversations: int


@dataclass(frozen=True, slots=True)
class Used:
    """What an owner and an account use on all nodes of a cluster.

    Attributes:
        now: the time of the database, in seconds since the epoch.
        held: by key of the account, its replies that run or wait.
        prompts: by key of the account, the prompts that are left and when they were.
        spent: the cost of the owner's replies that ended today.
        reserved: the highest cost of the owner's replies that have not ended.
    """

    now: float
    held: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, tuple[float, float]] = field(default_factory=dict)
    spent: Spent = NOTHING
    reserved: Spent = NOTHING


class Store(Protocol):
    """Keeps conversations and generations.

    The first generation of a conversation creates the conversation; its prompt becomes the title.
    Each owner has ids of its own: two owners may use the same id, and no owner sees the ids of
    another one.

    All methods raise :class:`~wsserver.errors.StoreError` if the store fails.
    """

    async def open(self) -> None:
        """Open the store.

        Raises:
            ConfigError: the store cannot be used.
        """
        ...

    async def close(self) -> None:
        """Close the store. Idempotent."""
        ...

    def now(self) -> float:
        """Return the time in seconds since the epoch, by the clock that all users share."""
        ...

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Save all entries or none. Saving an entry again changes nothing.

        The content of a deleted generation is dropped. Its cost is added to the owner's spending
        once, with the first terminal.

        Raises:
            Unsavable: one entry cannot be saved; the others can.
        """
        ...

    async def find(self, owner: str, generation: str) -> StoredGeneration | Forgotten | None:
        """Return an owner's latest generation of an id.

        Returns:
            The generation while it is stored. After a delete or a purge, its trace for
            :data:`TRACE_KEPT` seconds; an owner has at most :data:`TRACES` traces. Otherwise None.
        """
        ...

    async def load(
        self, owner: str, conversation: str, *, limit: int, size: int, before: int | None = None
    ) -> StoredConversation | None:
        """Return an owner's conversation with its newest turns, or with the turns before a number.

        Turns are read from the newest on until a limit is reached. At least one turn is returned,
        whatever its size. Replaced turns and withdrawn prompts are left out.

        Args:
            owner: the owner.
            conversation: the id of the conversation.
            limit: turns at most.
            size: bytes of prompts and replies at most, about, as UTF-8.
            before: the number of the turn after the last one; None for the newest turns.
        """
        ...

    async def list(self, owner: str, limit: int, before: int | None) -> Sequence[Summary]:
        """Return an owner's conversations, the one used last first.

        Args:
            owner: the owner.
            limit: conversations at most.
            before: the ``place`` of the last conversation of the page before; None at first.
        """
        ...

    async def rename(self, owner: str, conversation: str, title: str) -> bool:
        """Change the title of a conversation; return False if the owner does not have it."""
        ...

    async def delete(self, owner: str, conversation: str, before: float | None = None) -> bool:
        """Delete a conversation and its generations.

        Args:
            owner: the owner.
            conversation: the id of the conversation.
            before: delete the conversation only if its last use was before this time, in seconds
                since the epoch.

        Returns:
            False if the owner has no such conversation.
        """
        ...

    async def spent(self, owner: str, day: int) -> Spent:
        """Return the cost of an owner's replies that ended on a day, deleted ones included.

        The store keeps at least the costs of today and yesterday. See :func:`day_of`.
        """
        ...

    async def amounts(self, owner: str) -> Amounts:
        """Return how much an owner has stored."""
        ...

    async def purge(self, until: float) -> bool:
        """Delete some generations outside of conversations that ended before a time.

        It also deletes some expired traces and records of spending. One call deletes only a few, so
        that other calls do not wait.

        Returns:
            Whether there may be more to delete.
        """
        ...

    async def idle(self, before: float, limit: int) -> Sequence[tuple[str, str]]:
        """Return the owners and ids of some conversations that were last used before a time."""
        ...

    async def probe(self) -> None:
        """Check that the store can write, with a write that changes nothing."""
        ...


def day_of(seconds: float) -> int:
    """Return the day, in UTC and since the epoch, of a time in seconds since the epoch."""
    return int(seconds // 86400)


def partial(terminal: Terminal | None) -> str | None:
    """Return why a reply is incomplete: the code of an error, or a ``by``; else None."""
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
    """Make a turn; ``contents`` are the blocks of the prompt and the blocks of the reply."""
    return Turn(
        number,
        Message("user", contents[0], id=generation, began=began),
        Message(
            "assistant",
            contents[1],
            partial(terminal),
            id=generation,
            model=model,
            usage=None if terminal is None else terminal.usage,
            began=began,
            ended=ended,
            thought=None if terminal is None else terminal.thought,
        ),
    )


def title_of(prompt: Prompt) -> str:
    """Make a title from the first prompt: one line, cut at the end of a word."""
    return "" if prompt.prompt is None else shorten(prompt.new_messages[0].text)


def shorten(text: str) -> str:
    """Make a title from a text: one line, cut at the end of a word."""
    text = " ".join(text.split())
    if len(text) <= TITLE_LENGTH:
        return text
    space = text.rfind(" ", TITLE_LENGTH // 2, TITLE_LENGTH)
    return text[: space if space >= 0 else TITLE_LENGTH - 1] + "…"
