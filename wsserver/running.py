"""One generation from its start to its end: ask the model, watch it, save the end, tell the end."""

import asyncio
import functools
import itertools
from collections.abc import Callable

from wsserver.context import less_than, messages_of
from wsserver.errors import TOO_LONG, Code, ModelError
from wsserver.generation import End, State
from wsserver.intake import Intake
from wsserver.journal import Journal
from wsserver.limits import Memory
from wsserver.live import FirstPiece, Generation, Outcome
from wsserver.logs import log as events
from wsserver.models.base import (
    Message,
    Model,
    PushModel,
    Request,
    declared_name,
    name_of,
    provider_of,
)
from wsserver.prices import Price
from wsserver.protocol import StoppedBy, Terminal
from wsserver.reporting import Reporter
from wsserver.settings import Settings
from wsserver.telemetry import Span, span

__all__ = ["Runner"]

SHORTER = 4  # attempts with ever less of a conversation, before the prompt alone is tried
# Who takes a prompt back. The history goes on without such a prompt, if nobody asked the model.
TAKEN_BACK = frozenset({"client", "deleted", "disconnect", "replaced"})


class Runner:
    """Runs generations, each in a task of its own.

    Args:
        model: answers the prompts.
        settings: the times and sizes of a reply.
        journal: saves the end of each generation before anyone learns of it.
        memory: counts the bytes of the logs.
        price: returns the price of a model.
        report: learns of each start and end.
        on_ended: called with each generation that has ended.

    Attributes:
        model_name: the model's name for clients.
        tasks: the tasks that run models, those of models that do not close their request included.
    """

    def __init__(
        self,
        model: Model | PushModel,
        settings: Settings,
        journal: Journal,
        memory: Memory,
        *,
        price: Callable[[str], Price],
        report: Reporter,
        on_ended: Callable[[Generation], None],
    ) -> None:
        self.model_name = name_of(model)
        self.tasks: set[asyncio.Task[End]] = set()
        self._declared_name = declared_name(model)
        self._provider = provider_of(model)
        self._model = model
        self._settings = settings
        self._journal = journal
        self._memory = memory
        self._price = price
        self._report = report
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()

    # Asking the model.

    def start(self, generation: Generation) -> None:
        """Ask the model."""
        generation.log.followers.append(FirstPiece(generation, self._loop.time))
        trace = span(
            generation=generation.id,
            conversation=generation.conversation_id,
            provider=self._provider,
            model=generation.model,
            max_tokens=generation.allowance,
            temperature=generation.prompt.temperature,
        )
        task = self._loop.create_task(self._run(generation, trace))
        generation.start(task, trace, self._loop.time())
        self.tasks.add(task)
        task.add_done_callback(functools.partial(self._finish, generation))
        self._watch(generation)
        self._report.started()

    def request(self, generation: Generation, size: int | None = None) -> Request:
        """Make the request to the model.

        Args:
            generation: the reply that the model is asked for.
            size: characters of the messages at most. None: the limit of the settings, or less if
                the model has refused less in this conversation.
        """
        prompt, settings, conversation = generation.prompt, self._settings, generation.conversation
        if conversation is None:
            messages = [Message(turn.role, turn.content) for turn in prompt.messages or ()]
        else:
            if size is None and (refused := conversation.refused.get(generation.model)) is not None:
                size = less_than(refused)
            messages = messages_of(
                conversation.turns,
                prompt.prompt or "",
                count=settings.history_messages,
                size=settings.history_size if size is None else min(settings.history_size, size),
            )
        return Request(
            messages=tuple(messages),
            model=self._declared_name if prompt.model in {None, self.model_name} else prompt.model,
            max_tokens=generation.allowance,
            system=prompt.system or settings.system or None,
            temperature=prompt.temperature,
        )

    async def _run(self, generation: Generation, trace: Span) -> End:
        """Have the model answer; a model that exits ends its reply and not the whole program."""
        try:
            with trace.current():
                return await self._answer(generation)
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError("a model tried to exit") from error

    async def _answer(self, generation: Generation) -> End:
        """Have the model answer, with less of the conversation if the model finds it too long."""
        stop = functools.partial(self.stop, generation, "disconnect")
        request = self.request(generation)
        for attempt in itertools.count(1):
            intake = Intake(generation, self._settings, self._memory, self._loop.time, stop)
            try:
                return await intake.run(self._model, request)
            except ModelError as error:
                conversation = generation.conversation
                alone = conversation is None or len(request.messages) == 1
                if error.code not in TOO_LONG or alone or generation.log.seq:
                    raise
                assert conversation is not None
                size = sum(len(message.content) for message in request.messages)
                conversation.refused[generation.model] = size
                events.info("prompt too long", id=generation.id, messages=len(request.messages))
                request = self.request(generation, None if attempt < SHORTER else 0)
                generation.heard = self._loop.time()
        raise AssertionError

    def _watch(self, generation: Generation) -> None:
        """End a reply that takes too long, and one whose model is silent for too long.

        One timer serves both limits. It looks when the model spoke last; no piece sets a timer.
        """
        settings, now = self._settings, self._loop.time()
        assert generation.began is not None
        silence_ends = generation.heard + settings.silence_timeout
        reply_ends = generation.began + settings.reply_timeout
        if now >= reply_ends:
            self.stop(generation, "timeout")
        elif now >= silence_ends:
            self.stop(generation, ModelError(Code.TIMEOUT))
        else:
            self._set_timer(generation, min(silence_ends, reply_ends), self._watch)

    # Ending the reply.

    def stop(self, generation: Generation, why: StoppedBy | ModelError) -> None:
        """Stop a generation. Its terminal follows once the request to the model is closed.

        Stopping a generation that is stopped or has its whole reply does nothing.

        Args:
            generation: the one to stop.
            why: who stops it, for ``done``; or what has failed, for ``error``.
        """
        now = self._loop.time()
        if generation.state is State.QUEUED:
            generation.stop(why, now)
            assert generation.conversation is not None
            generation.conversation.queue.remove(generation)
            self._save(generation, why)
        elif generation.state is State.RUNNING:
            assert generation.task is not None
            if generation.task.cancel():
                generation.stop(why, now)
                self._set_timer(generation, now + self._settings.stop_timeout, self.abandon)
            else:  # the model has just ended its answer
                self._finish(generation, generation.task)

    def abandon(self, generation: Generation) -> None:
        """End a stopped generation whose model does not close its request."""
        if generation.state is State.STOPPING:
            events.warning("model not closed", id=generation.id, model=generation.model)
            assert generation.why is not None
            self._save(generation, generation.why)

    def _finish(self, generation: Generation, task: "asyncio.Task[End]") -> None:
        """End a generation whose task is done, unless it was abandoned before."""
        self.tasks.discard(task)
        if generation.why is not None:
            self._report.closed(generation)
        if generation.state is State.STOPPING:
            assert generation.why is not None
            self._save(generation, generation.why)
        elif generation.state is State.RUNNING:
            self._save(generation, _outcome(task))

    def _save(self, generation: Generation, how: Outcome) -> None:
        """Save the end of a generation, and then tell it."""
        generation.save(how, self._loop.time())
        try:
            terminal = generation.terminal(how)
        except Exception as error:  # noqa: BLE001
            generation.failure = error
            terminal = generation.terminal(error)
        generation.spent = self._price(generation.model).spent(terminal.usage)
        if generation.span is not None:
            generation.span.end(terminal, generation.first_token)
        self._report.answered(generation, terminal)
        assert generation.record is not None
        self._journal.end(
            generation.record,
            terminal,
            functools.partial(self._end, generation, terminal),
            unsaid=generation.began is None and how in TAKEN_BACK,
        )

    def _end(self, generation: Generation, terminal: Terminal, saved: bool) -> None:  # noqa: FBT001
        """Write the terminal. A follower that fails must not keep the generation alive."""
        if not saved:
            terminal = terminal.model_copy(update={"saved": False})
        failure = generation.failure
        try:
            generation.end(terminal)
        except Exception as error:  # noqa: BLE001
            events.error("follower failed", id=generation.id, failure=error)
        self._on_ended(generation)
        self._report.ended(generation, terminal, failure)

    def _set_timer(
        self, generation: Generation, when: float, call: Callable[[Generation], None]
    ) -> None:
        if generation.timer is not None:
            generation.timer.cancel()
        generation.timer = self._loop.call_at(when, call, generation)


def _outcome(task: "asyncio.Task[End]") -> Outcome:
    """Return how a task ended that nobody has stopped."""
    if task.cancelled():  # the model leaked a CancelledError that nobody here raised
        return asyncio.CancelledError()
    return task.exception() or task.result()
