"""Generations and their conversations in memory, as data: no tasks are started here."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wsserver.content import Message, Usage, memory_of
from wsserver.errors import Code, ModelError, Refused
from wsserver.generation import (
    End,
    Event,
    Log,
    State,
    state_after,
)
from wsserver.hub.journal import Record
from wsserver.limits import CACHE, Account, memory_size
from wsserver.pieces import Run
from wsserver.prices import NOTHING, Spent
from wsserver.protocol import Prompt, StoppedBy, Terminal
from wsserver.stores.base import Turn, partial
from wsserver.telemetry import Span

SMALLEST_FRAME = 256  # least characters of merged text, for a client whose connections break
PROMPT = 1024  # bytes of a prompt in memory besides its texts
MESSAGE = 640  # bytes of each of its messages besides the text, in the prompt and in the request
RESUMED = 16  # remembered seqs after which clients resumed, per generation

Outcome = End | StoppedBy | BaseException
"""How a reply ended: the model ended it, it was stopped, or it failed."""


class Watcher(Protocol):
    """A client that has a conversation open. No method may raise or block."""

    def attach(self, generation: "Generation") -> None:
        """Follow a generation that has just been accepted."""
        ...

    def renamed(self, conversation: "Conversation", title: str) -> None:
        """Notify of the new title of the conversation."""
        ...

    def drop(self, conversation: "Conversation") -> None:
        """Stop following the conversation: it was deleted."""
        ...


@dataclass(eq=False, slots=True)
class Conversation:
    """A conversation of one owner: its turns, its generations that have not ended, its watchers."""

    id: str
    owner: str
    # The newest ended turns, oldest first. Each change makes a new sequence.
    turns: Sequence[Turn] = ()
    # The generation that runs, or whose end is being saved.
    running: "Generation | None" = None
    # The generations that wait for `running`, in order.
    queue: "list[Generation]" = field(default_factory=list)
    # Mirrors of the generations that another node runs or queues, in order.
    mirrors: "list[Generation]" = field(default_factory=list)
    # The clients that have the conversation open.
    watchers: dict[Watcher, None] = field(default_factory=dict)
    version: int = 0  # grows by one with each reply that ends
    # By model, the characters of the last messages that were too long; None if none were.
    refused: dict[str, int] | None = None
    exists: bool = False  # the conversation has a turn, or a generation was accepted in it
    loaded: bool = False  # `exists` and `turns` are known
    deleted: bool = False  # the conversation was deleted, or is being deleted
    renamed: bool = False  # a client gave it a title, or is about to
    # The number of requests that use this object. While there is one, the object stays in memory,
    # and the conversation has no second object.
    pins: int = 0
    loading: asyncio.Lock | None = None  # held while the turns are read from the store
    measured: Sequence[Turn] = ()  # the turns whose bytes are `turns_size`
    turns_size: int = 0
    account: Account = CACHE  # pays for the `size` bytes of the turns that are counted in memory
    size: int = 0

    @property
    def busy(self) -> bool:
        """Whether a generation runs, or prompts wait. False while a reply is only being saved."""
        running = self.running
        return running is not None and (running.state is State.RUNNING or bool(self.queue))

    def check(self, prompt: Prompt, queue_size: int) -> None:
        """Check that this conversation accepts a prompt now.

        Args:
            prompt: the prompt.
            queue_size: number of prompts that may wait.

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
            raise Refused(
                Code.LIMIT,
                "Too many messages wait in this conversation. Wait for the end of a reply.",
            )

    @property
    def live(self) -> "list[Generation]":
        """The running generation and the queued generations, in order."""
        return ([] if self.running is None else [self.running]) + self.queue + self.mirrors

    @property
    def idle(self) -> bool:
        """Whether the conversation can be dropped from memory."""
        return not (self.pins or self.live or self.watchers)

    @property
    def last(self) -> str | None:
        """The id of the newest turn, ended or not; None in an empty conversation."""
        if live := self.live:
            return live[-1].id
        return self.turns[-1].id if self.turns else None


@dataclass(eq=False, slots=True, weakref_slot=True)
class Generation:
    """One reply: its state, its log, and the facts about it.

    Only :meth:`start`, :meth:`stop`, :meth:`save`, :meth:`end` and :meth:`restore` change the
    state. An illegal event raises :class:`~wsserver.generation.IllegalTransition` and changes
    nothing. All times are of the event loop's clock.
    """

    id: str
    owner: str
    prompt: Prompt
    model: str
    conversation_id: str | None
    account: Account = ()  # the account whose limits apply
    # None for `messages`, and for a reply from the store.
    conversation: Conversation | None = None
    log: Log[Terminal] = field(default_factory=Log)
    state: State = State.QUEUED
    # The node that runs it, if this is a mirror. A mirror is QUEUED until it has ended.
    node: str | None = None
    # Of a mirror: its place in the queue and its last seq when the mirror was made.
    place: int | None = None
    reached: int = 0
    # Limits and costs.
    allowance: int = 0  # output tokens that the reply may have
    input_tokens: int = 0  # estimate of the input tokens of the request
    reserved: Spent = NOTHING  # the highest cost of the reply, until it has ended
    spent: Spent = NOTHING  # the cost of the reply, once it has ended
    record: Record | None = None  # the journal's record; None for a reply from the store
    memory: int = 0  # bytes that the account pays for until the end: the prompt and the log
    size: int = 0  # bytes of the ended generation in memory
    usage: Usage | None = None  # the last usage that the model reported
    accepted: float = 0.0  # when the prompt was accepted
    # Facts of RUNNING.
    # When the model was called; None for a prompt that was withdrawn before.
    began: float | None = None
    last_output: float = 0.0  # when the model last sent anything
    first_piece: float | None = None  # when the first piece arrived
    thinking_since: float | None = None  # while the model thinks, when its thinking began
    thought: float | None = None  # seconds that the model thought; None if it did not
    task: "asyncio.Task[End] | None" = None  # the task that runs the model
    span: Span | None = None
    # Facts of STOPPING.
    why: StoppedBy | ModelError | None = None  # cause of the stop, or the error of a time limit
    stopped: float = 0.0  # when it was stopped
    # Facts of SAVING.
    failure: BaseException | None = None  # what ended the reply, until the end is logged
    ended: float = 0.0  # when the reply was complete, and the store began to save its end
    # Readers.
    readers: int = 0  # number of clients that follow it
    unread: int | None = None  # tokens since the last reader left; None while there is a reader
    unaware_until: float = 0.0  # until when a client may not notice that its connection is dead
    kept_until: float = 0.0  # until when clients that have left can come back
    grace: asyncio.TimerHandle | None = None  # stops the reply, unless a reader comes back
    # The last run that a cursor encoded, for other cursors: position, run and frame.
    shared: tuple[tuple[object, ...], Run, bytes] | None = None
    resumed: tuple[int, ...] = ()  # the last seqs after which clients resumed
    # Characters of a frame for clients that resume; None for the setting `frame_size`.
    resume_limit: int | None = None

    def start(self, task: "asyncio.Task[End]", span: Span, now: float) -> None:
        """Note that a task runs the model."""
        self._move("start")
        self.task, self.span = task, span
        self.began = self.last_output = now

    def stop(self, why: StoppedBy | ModelError, now: float) -> None:
        """Note that the reply must end early, because of a stop or a time limit."""
        self._move("stop")
        self.why, self.stopped = why, now

    def save(self, how: Outcome, now: float) -> None:
        """Note how the reply ended. The store saves its end now."""
        self._move("save")
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None
        self.failure = how if isinstance(how, BaseException) else None
        self.note_block(self.stopped or now)
        self.ended = now

    def note_block(self, now: float, *, thinks: bool = False) -> None:
        """Note that a block began, of thinking or of another type, or that the reply ended."""
        if self.thinking_since is not None:
            self.thought = (self.thought or 0.0) + now - self.thinking_since
        self.thinking_since = now if thinks else None

    def end(self, terminal: Terminal) -> None:
        """Append the terminal, and drop the task, which refers to the traceback of a failure."""
        self._move("end")
        self.task = self.failure = self.shared = None
        self.log.end(terminal)

    def restore(self, terminal: Terminal) -> None:
        """Append the terminal of a reply from the store."""
        self._move("restore")
        self.log.end(terminal)

    def _move(self, event: Event) -> None:
        self.state = state_after(self.state, event)

    def resume(self, after: int, limit: int) -> int:
        """Return how many characters a frame may merge for a client that resumes after a piece.

        A client that resumes twice after the same piece lost its connection twice within one
        frame. From then on the frames for clients that resume are half as large.

        Args:
            after: the seq of the piece.
            limit: the characters for a client that never lost its connection.
        """
        if after in self.resumed:
            smallest = min(limit, SMALLEST_FRAME)
            self.resume_limit = max(smallest, (self.resume_limit or limit) // 2)
        else:
            self.resumed = (*self.resumed[1 - RESUMED :], after)
        return self.resume_limit or limit

    @property
    def prompt_size(self) -> int:
        """The bytes of the prompt in memory."""
        messages = self.prompt.new_messages
        size = memory_size(self.prompt.system or "") + sum(map(memory_of, messages))
        return PROMPT + MESSAGE * len(messages) + size

    @property
    def seconds(self) -> float:
        """Seconds that the model took; 0 if the model was not called."""
        return 0.0 if self.began is None else self.ended - self.began

    @property
    def first_token(self) -> float | None:
        """Seconds from the prompt to the first piece; None without a piece."""
        return None if self.first_piece is None else self.first_piece - self.accepted

    @property
    def queued(self) -> int | None:
        """The place in the conversation's queue, from 1; None once the reply runs."""
        if self.node is not None:
            return self.place
        if self.state is not State.QUEUED or self.conversation is None:
            return None
        return self.conversation.queue.index(self) + 1

    def turn(self, number: int) -> Turn:
        """Return the prompt and the reply as the turn of that number, from 1."""
        (prompt,) = self.prompt.new_messages
        reply = Message(
            "assistant",
            self.log.pieces.blocks(),
            partial(self.log.terminal),
            id=self.id,
            model=self.model,
        )
        return Turn(number, prompt, reply)
