"""The live generations of this process: start, stop, follow, grace, retention.

All methods are synchronous: what a client asks for is decided at once, in the order in which it
was asked. Only the models run in tasks, one per generation.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from wsserver.errors import Code, ModelError, Refused
from wsserver.generation import End, Follower, Log, State, Usage, well_formed
from wsserver.models.base import Message, Model, Request, name_of
from wsserver.protocol import Done, Error, Prompt, StoppedBy, Terminal, UsageCounts
from wsserver.settings import Settings

__all__ = ["Conversation", "Generation", "Hub"]

logger = logging.getLogger("wsserver")

CHARACTERS_PER_TOKEN = 4  # of English text, for usage that the model never told
KEPT_PER_REPLY = 4096  # bytes of an ended reply besides its text
PIECES_PER_TURN = 16  # taken from a model that never waits, before others get their turn


@dataclass(eq=False, slots=True)
class Conversation:
    """The messages so far, what is being said now, and the prompts that wait."""

    id: str
    messages: list[Message] = field(default_factory=list)
    running: "Generation | None" = None
    queue: "deque[Generation]" = field(default_factory=deque)

    @property
    def busy(self) -> bool:
        """Whether a prompt has to wait longer than for a request to be closed."""
        running = self.running
        return running is not None and (running.log.state is State.RUNNING or bool(self.queue))


@dataclass(eq=False, slots=True)
class Generation:
    """One reply being produced: its log, and what the hub needs to run and stop it."""

    id: str
    prompt: Prompt
    model: str
    conversation: Conversation | None
    log: Log[Terminal] = field(default_factory=Log)
    usage: Usage | None = None
    # Why it was cut short, once it was: what ends the log whatever its task still says.
    cut: StoppedBy | ModelError | None = None
    task: "asyncio.Task[End] | None" = None
    begun: bool = False  # the model was asked
    began: float = 0.0
    heard: float = 0.0  # when the model last gave a sign of life
    asked: int = 0  # characters sent to the model
    size: int = 0  # of what is kept once it has ended
    watch: asyncio.TimerHandle | None = None
    grace: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int | None:
        """The place in its conversation's queue, from 1; None once it runs."""
        if self.log.state is not State.QUEUED or self.conversation is None:
            return None
        return self.conversation.queue.index(self) + 1


class Hub:
    """Runs a model for whoever asks, and lets anyone follow.

    Args:
        model: what answers.
        settings: the limits and times that hold here.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model_name = name_of(model)
        self._model = model
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._generations: dict[str, Generation] = {}
        self._live: set[Generation] = set()
        self._tasks: set[asyncio.Task[End]] = set()
        self._ended: deque[tuple[float, Generation]] = deque()
        self._ended_size = 0
        self._sweep: asyncio.TimerHandle | None = None
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """How many generations are queued, running or being stopped."""
        return len(self._live)

    def find(self, generation_id: str | None) -> Generation | None:
        """Return the generation of that id, if it runs or ended within the replay time."""
        return self._generations.get(generation_id) if generation_id is not None else None

    def prompt(self, prompt: Prompt, own: str | None) -> Generation:
        """Accept a prompt: start a generation, queue it, or return the one that it already has.

        Args:
            prompt: what the client sent.
            own: the id of the conversation that goes on where the prompt names none; None makes
                a new one.

        Raises:
            Refused: it cannot be accepted, and nothing has changed.
        """
        if (known := self.find(prompt.id)) is not None:
            if known.prompt != prompt:
                raise Refused(Code.ID_CONFLICT)
            return known
        self._check(prompt)
        conversation = None if prompt.messages is not None else self._conversation(prompt, own)
        if conversation is not None and conversation.busy:
            if prompt.on_busy == "reject":
                raise Refused(Code.BUSY)
            if prompt.on_busy == "queue" and len(conversation.queue) >= self._settings.queue_size:
                raise Refused(Code.LIMIT, "The conversation's queue is full.")
        if conversation is not None:
            self._keep(conversation)

        generation = Generation(
            id=prompt.id or _new_id(),
            prompt=prompt,
            model=prompt.model or self.model_name,
            conversation=conversation,
        )
        self._generations[generation.id] = generation
        self._live.add(generation)
        self._idle.clear()
        if conversation is None or conversation.running is None:
            self._begin(generation)
        else:
            if prompt.on_busy == "interrupt":
                for waiting in tuple(conversation.queue):
                    self.stop(waiting, "replaced")
                self.stop(conversation.running, "replaced")
            conversation.queue.append(generation)
        return generation

    def stop(self, generation: Generation, why: StoppedBy | ModelError) -> None:
        """Stop a generation; its terminal follows once the request to the model is closed.

        Stopping what is being stopped or has ended does nothing.

        Args:
            generation: which.
            why: who stops it, for ``done``; or what has failed, for ``error``.
        """
        log = generation.log
        if log.state in {State.STOPPING, State.ENDED}:
            return
        waiting = log.state is State.QUEUED
        log.stop()
        if waiting:
            assert generation.conversation is not None
            generation.conversation.queue.remove(generation)
            self._end(generation, why)
        elif generation.task is not None and generation.task.cancel():
            generation.cut = why
            _cancel(generation.watch)
            generation.watch = self._loop.call_later(
                self._settings.stop_timeout, self._abandon, generation
            )
        # Else the task has just ended by itself, and is about to say how.

    def follow(self, generation: Generation, follower: Follower) -> None:
        """Have the follower woken from now on, and the generation go on for its sake."""
        generation.log.followers.append(follower)
        _cancel(generation.grace)
        generation.grace = None

    def unfollow(self, generation: Generation, follower: Follower) -> None:
        """Wake the follower no more. If it was the last one, the grace time begins."""
        log = generation.log
        log.followers.remove(follower)
        if not log.followers and log.state is not State.ENDED:
            generation.grace = self._loop.call_later(
                self._settings.grace, self.stop, generation, "disconnect"
            )

    async def drain(self) -> None:
        """Refuse prompts, stop those that wait, and let the rest finish within the drain time."""
        self._draining = True
        for generation in tuple(self._live):
            if generation.log.state is State.QUEUED:
                self.stop(generation, "shutdown")
        await self._until_idle(self._settings.drain_timeout)
        for generation in tuple(self._live):
            self.stop(generation, "shutdown")
        await self._until_idle(self._settings.stop_timeout)

    async def _until_idle(self, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._idle.wait()

    async def close(self, within: float) -> None:
        """Stop whatever still runs, and forget everything. Idempotent.

        Args:
            within: seconds that models get to close their requests.
        """
        self._draining = True
        for generation in tuple(self._live):
            self.stop(generation, "shutdown")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)
        for generation in self._generations.values():
            _cancel(generation.watch)
            _cancel(generation.grace)
        _cancel(self._sweep)

    # Accepting a prompt.

    def _check(self, prompt: Prompt) -> None:
        settings = self._settings
        if self._draining:
            raise Refused(Code.SHUTTING_DOWN)
        if (size := prompt.size) > settings.prompt_size:
            raise Refused(
                Code.TOO_LONG, f"The prompt has {size} bytes; {settings.prompt_size} are allowed."
            )
        if prompt.model not in {None, self.model_name, *settings.models}:
            raise Refused(Code.MODEL_NOT_ALLOWED)
        if self.live >= settings.generations:
            raise Refused(Code.LIMIT, "The server runs as many generations as it may.")

    def _conversation(self, prompt: Prompt, own: str | None) -> Conversation:
        name = prompt.conversation or own or _new_id()
        return self._conversations.get(name) or Conversation(name)

    def _keep(self, conversation: Conversation) -> None:
        """Remember a conversation as the one used last, and forget those used least."""
        self._conversations[conversation.id] = conversation
        self._conversations.move_to_end(conversation.id)
        excess = len(self._conversations) - self._settings.conversations
        if excess > 0:
            idle = (c.id for c in self._conversations.values() if c.running is None)
            for name in tuple(itertools.islice(idle, excess)):
                if name != conversation.id:
                    del self._conversations[name]

    # Running a model.

    def _begin(self, generation: Generation) -> None:
        request = self._request(generation)
        generation.log.begin()
        generation.begun = True
        generation.asked = sum(len(message.content) for message in request.messages)
        generation.began = generation.heard = self._loop.time()
        self._watch(generation)
        task = generation.task = self._loop.create_task(self._guarded(generation, request))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._finished(generation, task))

    def _request(self, generation: Generation) -> Request:
        prompt, settings = generation.prompt, self._settings
        conversation = generation.conversation
        if conversation is None:
            messages = [Message(turn.role, turn.content) for turn in prompt.messages or ()]
        else:
            conversation.running = generation
            said = Message("user", prompt.prompt or "")
            # A prompt that is sent again after it failed without a word is not said twice.
            if not conversation.messages or conversation.messages[-1] != said:
                conversation.messages.append(said)
            conversation.messages = _fitting(conversation.messages, settings.history_size)
            messages = _without_refusals(conversation.messages)
        return Request(
            messages=tuple(messages),
            model=generation.model,
            max_tokens=min(prompt.max_tokens or settings.max_tokens, settings.max_tokens_limit),
            system=prompt.system or settings.system or None,
            temperature=prompt.temperature,
        )

    async def _run(self, generation: Generation, request: Request) -> End:
        """Move pieces from the model to the log; return the model's end of it."""
        log, time = generation.log, self._loop.time
        end = End()
        room, size = self._settings.reply_size, self._settings.frame_size
        turn = 0
        async with _closing(self._model(request)) as pieces:
            async for piece in pieces:
                if generation.cut is not None:  # the model kept the cancellation to itself
                    break
                if isinstance(piece, str):
                    generation.heard = time()
                    text = well_formed(piece)
                    if len(text) <= size and len(text) < room:
                        log.append(text)
                    else:  # what a model says all at once goes on in parts that a frame can hold
                        for start in range(0, min(len(text), room), size):
                            log.append(type(text)(text[start : min(start + size, room)]))
                    room -= len(text)
                    if room <= 0:
                        return End("max_tokens")
                elif isinstance(piece, Usage):
                    generation.usage = piece
                elif isinstance(piece, End):
                    end = piece
                else:
                    raise TypeError(f"a model yielded {type(piece).__name__}")
                turn += 1
                if turn == PIECES_PER_TURN:
                    turn = 0
                    await asyncio.sleep(0)
        return end

    async def _guarded(self, generation: Generation, request: Request) -> End:
        """Run it, and let no model end the whole program."""
        try:
            return await self._run(generation, request)
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError("a model tried to exit") from error

    def _watch(self, generation: Generation) -> None:
        """Cut a generation that is silent for too long; stop one that takes too long.

        One timer for both, which looks when it fires, and not one that is set anew per piece.
        """
        settings, now = self._settings, self._loop.time()
        silence_ends = generation.heard + settings.silence_timeout
        reply_ends = generation.began + settings.reply_timeout
        if now >= reply_ends:
            self.stop(generation, "timeout")
        elif now >= silence_ends:
            self.stop(generation, ModelError(Code.TIMEOUT))
        else:
            generation.watch = self._loop.call_at(
                min(silence_ends, reply_ends), self._watch, generation
            )

    # Ending one.

    def _abandon(self, generation: Generation) -> None:
        logger.warning("generation %s: the model does not let itself be closed", generation.id)
        assert generation.cut is not None
        self._end(generation, generation.cut)

    def _finished(self, generation: Generation, task: "asyncio.Task[End]") -> None:
        self._tasks.discard(task)
        failure = None if task.cancelled() else task.exception()
        if generation.log.state is State.ENDED:  # it was abandoned before
            return
        if generation.cut is not None:
            self._end(generation, generation.cut)
        elif task.cancelled():  # by nobody here: a model lets out what it should keep to itself
            self._end(generation, asyncio.CancelledError())
        elif failure is not None:
            self._end(generation, failure)
        else:
            self._end(generation, task.result())

    def _end(self, generation: Generation, how: End | StoppedBy | BaseException) -> None:
        """Write the terminal, keep what was said, and let the next prompt begin."""
        log, conversation = generation.log, generation.conversation
        _cancel(generation.watch)
        _cancel(generation.grace)
        try:
            terminal = self._terminal(generation, how)
        except Exception as error:  # noqa: BLE001
            terminal = self._terminal(generation, error)
        if conversation is not None and generation.begun:
            self._remember(conversation, log.text, terminal)
        if conversation is not None and conversation.running is generation:
            conversation.running = None
        self._live.discard(generation)
        self._retain(generation)
        log.end(terminal)
        self._report(generation, terminal)
        generation.task = None  # with the traceback of a failure, and all that holds on to
        if conversation is not None and conversation.running is None and conversation.queue:
            self._begin(conversation.queue.popleft())
        if not self._live:
            self._idle.set()

    def _remember(self, conversation: Conversation, text: str, terminal: Terminal) -> None:
        messages = conversation.messages
        if text.strip():
            messages.append(Message("assistant", text, _partial(terminal)))
        elif isinstance(terminal, Error) and not terminal.retryable:
            messages.pop()  # with it, every later prompt would fail as this one did

    def _terminal(self, generation: Generation, how: End | StoppedBy | BaseException) -> Terminal:
        if isinstance(how, End):
            usage = how.usage or self._usage(generation)
            return Done(
                id=generation.id,
                seq=generation.log.seq,
                reason=well_formed(how.reason),
                usage=UsageCounts.of(usage),
            )
        usage = self._usage(generation)
        if isinstance(how, str):
            return Done(
                id=generation.id,
                seq=generation.log.seq,
                reason="stopped",
                by=how,
                usage=UsageCounts.of(usage),
            )
        error = how if isinstance(how, ModelError) else ModelError(Code.INTERNAL)
        return Error(
            code=error.code,
            message=well_formed(error.message),
            id=generation.id,
            seq=generation.log.seq,
            retryable=error.retryable,
            retry_after=error.retry_after,
            usage=UsageCounts.of(usage),
            ref=self._log_failure(generation, how),
        )

    def _usage(self, generation: Generation) -> Usage:
        """Return what the model said that it used; where it never said, what it likely was."""
        if not generation.begun:
            return Usage()
        if (usage := generation.usage) is not None and not usage.estimated:
            return usage
        if usage is None:
            usage = Usage(input_tokens=_tokens(generation.asked), estimated=True)
        said = _tokens(sum(map(len, generation.log.pieces)))
        return usage.but(output_tokens=max(usage.output_tokens, said))

    def _log_failure(self, generation: Generation, how: BaseException) -> str:
        ref = secrets.token_hex(4)
        if isinstance(how, ModelError):
            cause = type(how.__cause__).__name__ if how.__cause__ is not None else "no exception"
            logger.warning("%s: generation %s: %s (%s)", ref, generation.id, how.code, cause)
        else:
            logger.error("%s: generation %s failed", ref, generation.id, exc_info=how)
        return ref

    def _report(self, generation: Generation, terminal: Terminal) -> None:
        logger.info(
            "generation %s: %s%s, %d pieces in %.2f s",
            generation.id,
            terminal.reason if isinstance(terminal, Done) else f"error {terminal.code}",
            f" by {terminal.by}" if isinstance(terminal, Done) and terminal.by else "",
            generation.log.seq,
            self._loop.time() - generation.began if generation.begun else 0.0,
        )

    # Keeping the ended.

    def _retain(self, generation: Generation) -> None:
        """Keep an ended generation for the replay time, and within the replay size."""
        said = sum(map(len, generation.log.pieces))
        generation.size = KEPT_PER_REPLY + generation.prompt.size + said
        self._ended.append((self._loop.time() + self._settings.replay, generation))
        self._ended_size += generation.size
        if self._sweep is None:
            self._sweep = self._loop.call_at(self._ended[0][0], self._forget)
        while self._ended_size > self._settings.replay_size:
            self._forget_oldest()

    def _forget(self) -> None:
        self._sweep = None
        while self._ended and self._ended[0][0] <= self._loop.time():
            self._forget_oldest()
        if self._ended:
            self._sweep = self._loop.call_at(self._ended[0][0], self._forget)

    def _forget_oldest(self) -> None:
        _, generation = self._ended.popleft()
        self._ended_size -= generation.size
        del self._generations[generation.id]


def _new_id() -> str:
    return secrets.token_urlsafe(16)


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


def _partial(terminal: Terminal) -> str | None:
    """Say why a reply is not whole; None where it is."""
    if isinstance(terminal, Error):
        return terminal.code
    return terminal.by


def _without_refusals(messages: list[Message]) -> list[Message]:
    """Leave out the turns that the model declined: it would go on to decline those after them."""
    kept: list[Message] = []
    for message in messages:
        if message.partial == Code.REFUSAL:
            kept.pop()
        else:
            kept.append(message)
    return kept


def _fitting(messages: list[Message], size: int) -> list[Message]:
    """Drop the oldest turns until the rest fits, and begins with the user."""
    total = sum(len(message.content) for message in messages)
    first = 0
    while first < len(messages) - 1 and (total > size or messages[first].role != "user"):
        total -= len(messages[first].content)
        first += 1
    return messages[first:] if first else messages


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


@contextlib.asynccontextmanager
async def _closing(
    pieces: AsyncIterator[str | Usage | End],
) -> AsyncIterator[AsyncIterator[str | Usage | End]]:
    """As :func:`contextlib.aclosing`, for iterators that cannot be closed as well."""
    try:
        yield pieces
    finally:
        aclose = getattr(pieces, "aclose", None)
        if aclose is not None:
            await aclose()
