"""What is live in this process, as data: generations, and the conversations that they are in."""

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.content import Usage
from wsserver.errors import NOT_TAKEN, Code, ModelError, Refused
from wsserver.generation import (
    End,
    Event,
    Log,
    Run,
    State,
    Thinking,
    state_after,
    tokens_in,
    well_formed,
)
from wsserver.journal import Record
from wsserver.limits import CACHE, Account, held
from wsserver.logs import log as events
from wsserver.prices import NOTHING, Spent
from wsserver.protocol import Done, Error, Prompt, StoppedBy, Terminal, UsageCounts
from wsserver.stores.base import StoredGeneration, Turn, partial
from wsserver.telemetry import Span

__all__ = [
    "Conversation",
    "Generation",
    "Outcome",
    "Watcher",
    "restored",
]

SMALLEST_FRAME = 256  # characters: frames are not made smaller than this for a client that is cut
PROMPT = 1024  # bytes of a prompt in memory besides its texts
MESSAGE = 640  # bytes of a message of a prompt besides its text, in the prompt and in the request
RESUMED = 16  # places of a generation from which clients went on, that are remembered

Outcome = End | StoppedBy | BaseException
"""How a generation came to its end: by itself, by someone, or by a failure."""


class Watcher(Protocol):
    """Whoever has a conversation open. No method may raise or wait."""

    def attach(self, generation: "Generation") -> None:
        """Follow a generation that has just been accepted."""
        ...

    def renamed(self, conversation: "Conversation", title: str) -> None:
        """Tell the new title of the conversation."""
        ...

    def drop(self, conversation: "Conversation") -> None:
        """Follow the conversation no more: it was deleted."""
        ...


@dataclass(eq=False, slots=True)
class Conversation:
    """The turns so far, the running generation, the queued ones, and the watchers.

    ``exists``: it has a turn, or a generation was accepted in it. ``loaded``: ``exists`` and
    ``turns`` are known. ``holders`` counts the requests that decide something about the
    conversation: while there is one, the process has no second object for the conversation.
    """

    id: str
    owner: str
    turns: list[Turn] = field(default_factory=list)
    running: "Generation | None" = None
    queue: "list[Generation]" = field(default_factory=list)
    watchers: dict[Watcher, None] = field(default_factory=dict)
    version: int = 0  # grows with each reply that ends
    refused: dict[str, int] = field(default_factory=dict)  # by model: characters too long for it
    exists: bool = False
    loaded: bool = False
    deleted: bool = False
    holders: int = 0
    loading: asyncio.Lock | None = None  # held while the turns are read
    account: Account = CACHE  # to which the bytes of the turns are counted
    size: int = 0  # these bytes

    @property
    def busy(self) -> bool:
        """Whether a prompt has to wait longer than for a request to be closed."""
        running = self.running
        return running is not None and (running.state is State.RUNNING or bool(self.queue))

    def check(self, prompt: Prompt, queue_size: int) -> None:
        """Pass a prompt that this conversation takes now.

        Args:
            prompt: what the client sent.
            queue_size: how many prompts may wait.

        Raises:
            Refused: the conversation was deleted, is busy, or its queue is full; or the prompt
                retries another turn than the last one.
        """
        if self.deleted:
            raise Refused(Code.NOT_FOUND)
        if prompt.retry_of is not None and prompt.retry_of != self.last:
            raise Refused(Code.NOT_LAST)
        if self.busy and prompt.on_busy == "reject":
            raise Refused(Code.BUSY)
        if self.busy and prompt.on_busy == "queue" and len(self.queue) >= queue_size:
            raise Refused(Code.LIMIT, "The conversation's queue is full.")

    @property
    def live(self) -> "list[Generation]":
        """The running generation and the queued ones, in order."""
        return ([] if self.running is None else [self.running]) + self.queue

    @property
    def idle(self) -> bool:
        """Whether the conversation can be dropped from memory."""
        return not (self.holders or self.live or self.watchers)

    @property
    def last(self) -> str | None:
        """The id of the newest turn, which may still run or wait; None where there is none."""
        if live := self.live:
            return live[-1].id
        return self.turns[-1].id if self.turns else None


@dataclass(eq=False, slots=True)
class Generation:
    """One reply being produced: its log, and what is needed to run and stop it."""

    id: str
    owner: str
    prompt: Prompt
    model: str
    conversation_id: str | None
    account: Account = ()  # whose limits count
    allowance: int = 0  # output tokens that it may use
    reserved: Spent = NOTHING  # of its owner's day, until it is known what it has cost
    spent: Spent = NOTHING  # what it has cost, once it has ended
    conversation: Conversation | None = None  # None too for one that comes from the store
    log: Log[Terminal] = field(default_factory=Log)
    record: Record | None = None  # the journal's; None for a reply that comes from the store
    usage: Usage | None = None
    state: State = State.QUEUED  # changed by start, stop, save and end alone
    accepted: float = 0.0  # this time and those below are of the event loop's clock
    # Set by `start`.
    began: float | None = None  # None: nobody asked the model
    heard: float = 0.0  # when the model last gave a sign of life
    spoke: float | None = None  # when the first piece came
    task: "asyncio.Task[End] | None" = None  # reads the model's answer
    span: Span | None = None
    # Set by `stop`.
    why: StoppedBy | ModelError | None = None
    stopped: float = 0.0
    # Set by `save`.
    failure: BaseException | None = None
    ended: float = 0.0
    asked: int = 0  # tokens that the model is asked with, about
    memory: int = 0  # bytes that the log has taken of the account's memory
    size: int = 0  # of what is kept once it has ended
    readers: int = 0
    unread: int | None = None  # tokens since the last reader left; None while there is a reader
    unaware_until: float = 0.0  # until when the client may not know that it is not connected
    grace: asyncio.TimerHandle | None = None  # stops the reply if no reader comes back
    # What a cursor has read last, for others in the same place: the place, the run and its frame.
    shared: tuple[tuple[object, ...], Run, bytes] | None = None
    resumed: tuple[int, ...] = ()  # seqs after which clients went on
    merged: int | None = None  # characters of a frame for clients that were cut; None: as set

    def start(self, task: "asyncio.Task[End]", span: Span, now: float) -> None:
        """The model is asked, by a task."""
        self._move("start")
        self.task, self.span = task, span
        self.began = self.heard = now

    def stop(self, why: StoppedBy | ModelError, now: float) -> None:
        """The reply is to end early: somebody stops it, or a time limit is over."""
        self._move("stop")
        self.why, self.stopped = why, now

    def save(self, how: Outcome, now: float) -> None:
        """The reply is complete, and the store saves its end."""
        self._move("save")
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None
        self.failure = how if isinstance(how, BaseException) else None
        self.ended = now

    def end(self, terminal: Terminal) -> None:
        """Write the terminal, and let go of the task, which holds the traceback of a failure."""
        self._move("end")
        self.task = self.failure = self.shared = None
        self.log.end(terminal)

    def restore(self, terminal: Terminal) -> None:
        """Write the terminal of a reply that comes from the store."""
        self._move("restore")
        self.log.end(terminal)

    def _move(self, event: Event) -> None:
        self.state = state_after(self.state, event)

    def resume(self, after: int, limit: int) -> int:
        """Return how many characters a frame may merge for a client that goes on after a piece.

        A client that goes on twice after the same piece was cut twice before the next frame was
        whole. From then on the frames for clients that go on are half as large.

        Args:
            after: the seq of the piece.
            limit: the characters where nobody was cut.
        """
        if after in self.resumed:
            smallest = min(limit, SMALLEST_FRAME)
            self.merged = max(smallest, (self.merged or limit) // 2)
        else:
            self.resumed = (*self.resumed[1 - RESUMED :], after)
        return self.merged or limit

    @property
    def prompt_size(self) -> int:
        """The bytes of the prompt in memory."""
        prompt = self.prompt
        messages = prompt.messages or ()
        texts = (prompt.prompt or "", prompt.system or "", *(turn.content for turn in messages))
        return PROMPT + MESSAGE * len(messages) + sum(map(held, texts))

    @property
    def seconds(self) -> float:
        """Seconds that the model took; 0 where the model was not asked."""
        return 0.0 if self.began is None else self.ended - self.began

    @property
    def first_token(self) -> float | None:
        """Seconds from the prompt to the first piece; None where there is none."""
        return None if self.spoke is None else self.spoke - self.accepted

    @property
    def queued(self) -> int | None:
        """The place in its conversation's queue, from 1; None once it runs."""
        if self.state is not State.QUEUED or self.conversation is None:
            return None
        return self.conversation.queue.index(self) + 1

    def terminal(self, how: Outcome) -> Terminal:
        """Make the terminal frame for how it ended."""
        if isinstance(how, End):
            usage = UsageCounts.of(how.usage or self.used())
            reason = well_formed(how.reason)
            return Done(id=self.id, seq=self.log.seq, reason=reason, usage=usage)
        if isinstance(how, str):
            usage = UsageCounts.of(self.used())
            return Done(id=self.id, seq=self.log.seq, reason="stopped", by=how, usage=usage)
        error = how if isinstance(how, ModelError) else ModelError(Code.INTERNAL)
        unanswered = self.usage is None and not self.log.seq
        free = unanswered and error.code in NOT_TAKEN
        usage = UsageCounts.of(Usage() if free else self.used())
        return Error(
            code=error.code,
            message=well_formed(error.message),
            id=self.id,
            seq=self.log.seq,
            retryable=error.retryable,
            retry_after=error.retry_after,
            usage=usage,
            ref=_new_ref(),
        )

    def used(self) -> Usage:
        """Return what the model said that it used; where it never said, what it likely was."""
        if self.began is None:
            return Usage()
        if (usage := self.usage) is not None and not usage.estimated:
            return usage
        if usage is None:
            usage = Usage(input_tokens=self.asked, estimated=True)
        thought = tokens_in("".join(p for p in self.log.pieces if type(p) is Thinking))
        said = tokens_in(self.log.text) + max(thought, usage.thinking_tokens)
        return usage.but(output_tokens=max(usage.output_tokens, said))

    def turn(self, number: int) -> Turn:
        """Return it as a turn of its conversation, with its number in there, from 1."""
        text, how = self.log.text, partial(self.log.terminal)
        return Turn(number, self.id, self.prompt.prompt or "", text, how)


def restored(stored: StoredGeneration) -> Generation:
    """Make a generation of what was saved; one whose process died ends as ``interrupted``."""
    header = stored.header
    generation = Generation(
        header.id, header.owner, header.prompt, header.model, header.conversation
    )
    log = generation.log
    for piece in stored.pieces:
        log.append(piece)
    terminal = stored.terminal
    if terminal is None:
        if stored.pieces:  # else the model was perhaps not asked
            generation.began = 0.0
            generation.asked = tokens_in(header.prompt.text)
        code, ref = Code.INTERRUPTED, _new_ref()
        events.info("interrupted", id=header.id, conversation=header.conversation, ref=ref)
        terminal = Error(
            code=code,
            message=code.meaning,
            id=header.id,
            seq=log.seq,
            retryable=code.retryable,
            usage=UsageCounts.of(generation.used()),
            ref=ref,
        )
    generation.restore(terminal)
    return generation


def _new_ref() -> str:
    return secrets.token_hex(4)
