"""Runs one generation: calls the model, checks its time limits, saves its end, and publishes it."""

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable

from wsserver.errors import TOO_LONG, Code, ModelError
from wsserver.generation import End, State
from wsserver.hub.context import less_than, messages_of
from wsserver.hub.endings import terminal_of
from wsserver.hub.intake import Intake
from wsserver.hub.journal import Journal
from wsserver.hub.live import Generation, Outcome
from wsserver.hub.reporting import Reporter
from wsserver.limits import Memory
from wsserver.logs import log as events
from wsserver.models.base import Model, PushModel, Request, declared_name, name_of, provider_of
from wsserver.prices import Price
from wsserver.protocol import StoppedBy, Terminal
from wsserver.settings import Settings
from wsserver.telemetry import span

SHORTER = 4  # attempts with fewer turns each, before one with the prompt only
# Causes of a stop that remove a prompt from the history, if the model was not called yet.
WITHDRAWN_BY = frozenset({"client", "deleted", "disconnect", "replaced"})


class Runner:
    """Runs generations, each in a task of its own.

    Args:
        model: answers the prompts.
        settings: the times and sizes of a reply.
        journal: saves the end of each generation before it is published.
        memory: counts the bytes of the logs.
        price: returns the price of a model.
        report: reports each start and end.
        on_ended: called with each generation that has ended.
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
        self.model_name = name_of(model)  # the model's name for clients
        # The tasks that run models, each with its generation. A model that does not close its
        # request keeps its task beyond the end of the generation.
        self.tasks: dict[asyncio.Task[End], Generation] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._declared_name = declared_name(model)
        self._provider = provider_of(model)
        self._ask = _starter(model)
        self._settings = settings
        self._journal = journal
        self._memory = memory
        self._price = price
        self._report = report
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time  # made once, for all generations
        self._stop = self.stop

    # Asking the model.

    def start(self, generation: Generation, request: Request | None = None) -> None:
        """Call the model.

        Args:
            generation: the reply.
            request: the request, if the caller has already made it.
        """
        trace = span(
            generation=generation.id,
            conversation=generation.conversation_id,
            provider=self._provider,
            model=generation.model,
            max_tokens=generation.allowance,
            temperature=generation.prompt.temperature,
        )
        task = self._loop.create_task(self._run(generation, request), context=trace.context())
        generation.start(task, trace, self._time())
        self.tasks[task] = generation
        task.add_done_callback(self._finish)
        self._watch(self._due(generation))
        self._report.started()

    def request(self, generation: Generation, size: int | None = None) -> Request:
        """Make the request to the model.

        Args:
            generation: the reply.
            size: characters of the messages at most. None: the limit of the settings, or less if
                the model refused a longer request in this conversation.
        """
        prompt, settings, conversation = generation.prompt, self._settings, generation.conversation
        if conversation is None:
            messages = list(prompt.new_messages)
        else:
            refused = (conversation.refused or {}).get(generation.model)
            if size is None and refused is not None:
                size = less_than(refused)
            messages = messages_of(
                conversation.turns,
                prompt.new_messages[0],
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

    async def _run(self, generation: Generation, request: Request | None) -> End:
        """Call the model; again with fewer turns if the model finds the conversation too long."""
        request = request or self.request(generation)
        attempt = 0
        while True:
            attempt += 1
            intake = Intake(generation, self._settings, self._memory, self._time, self._stop)
            try:
                return await intake.run(self._ask(request, intake))
            except ModelError as error:
                conversation = generation.conversation
                alone = conversation is None or len(request.messages) == 1
                if error.code not in TOO_LONG or alone or generation.log.seq:
                    raise
                assert conversation is not None
                size = sum(message.size for message in request.messages)
                conversation.refused = {**(conversation.refused or {}), generation.model: size}
                events.info("prompt too long", id=generation.id, messages=len(request.messages))
                request = self.request(generation, None if attempt < SHORTER else 0)
                generation.last_output = self._time()
            except (SystemExit, KeyboardInterrupt) as error:  # which would end the whole program
                raise RuntimeError("a model tried to exit") from error

    # Time limits. One timer serves all generations, and no piece sets it.

    def _due(self, generation: Generation) -> float:
        """Return the time at which a generation reaches its next time limit."""
        settings = self._settings
        if generation.state is State.STOPPING:
            return generation.stopped + settings.stop_timeout
        if generation.state is State.RUNNING:
            assert generation.began is not None
            silence_ends = generation.last_output + settings.silence_timeout
            return min(silence_ends, generation.began + settings.reply_timeout)
        return math.inf

    def _watch(self, due: float) -> None:
        """Set the timer, so that the time limits are checked at ``due`` at the latest."""
        if self._timer is None or due < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._check_time_limits)

    def _check_time_limits(self) -> None:
        """End each generation that has reached a time limit."""
        self._timer = None
        now = self._time()
        for generation in tuple(self.tasks.values()):
            if self._due(generation) <= now:
                self._expire(generation, now)
        due = min(map(self._due, self.tasks.values()), default=math.inf)
        if due < math.inf:
            self._watch(due)

    def _expire(self, generation: Generation, now: float) -> None:
        if generation.state is State.STOPPING:
            self._abandon(generation)
            return
        assert generation.began is not None
        if now >= generation.began + self._settings.reply_timeout:
            self.stop(generation, "timeout")
            return
        silent = ModelError(Code.TIMEOUT)
        silent.advice = "raise silence_timeout if the model loads, or reads prompts, for longer"
        self.stop(generation, silent)

    def close(self) -> None:
        """Abandon the generations whose models do not close their requests; stop the timer."""
        for generation in tuple(self.tasks.values()):
            self._abandon(generation)
        if self._timer is not None:
            self._timer.cancel()

    # Ending the reply.

    def stop(self, generation: Generation, why: StoppedBy | ModelError) -> None:
        """Stop a generation. Its terminal follows once the request to the model is closed.

        Stopping a generation that is stopped or has its whole reply does nothing.

        Args:
            generation: the one to stop.
            why: the ``by`` of a ``done`` frame; or the error, for an ``error`` frame.
        """
        if generation.state is State.QUEUED:
            generation.stop(why, self._time())
            assert generation.conversation is not None
            generation.conversation.queue.remove(generation)
            self._save(generation, why)
        elif generation.state is State.RUNNING:
            assert generation.task is not None
            if generation.task.cancel():
                generation.stop(why, self._time())
                self._watch(self._due(generation))
            else:  # the model has just ended its answer
                self._finish(generation.task)

    def _abandon(self, generation: Generation) -> None:
        """End a stopped generation whose model does not close its request."""
        if generation.state is State.STOPPING:
            events.warning("model not closed", id=generation.id, model=generation.model)
            assert generation.why is not None
            self._save(generation, generation.why)

    def _finish(self, task: "asyncio.Task[End]") -> None:
        """End the generation of a finished task, unless the generation was abandoned before."""
        generation = self.tasks.pop(task, None)
        if generation is None:  # a stop has met the task before this callback
            return
        if generation.why is not None:
            self._report.closed(generation)
        if generation.state is State.STOPPING:
            assert generation.why is not None
            self._save(generation, generation.why)
        elif generation.state is State.RUNNING:
            self._save(generation, _outcome(task))

    def _save(self, generation: Generation, how: Outcome) -> None:
        """Save the end of a generation, and then publish it."""
        generation.save(how, self._time())
        try:
            terminal = terminal_of(generation, how)
        except Exception as error:  # noqa: BLE001
            generation.failure = error
            terminal = terminal_of(generation, error)
        generation.spent = self._price(generation.model).spent(terminal.usage)
        if generation.span is not None:
            generation.span.end(terminal, generation.first_token)
        self._report.answered(generation, terminal)
        assert generation.record is not None
        self._journal.save_end(
            generation.record,
            terminal,
            functools.partial(self._append_terminal, generation, terminal),
            withdrawn=generation.began is None and how in WITHDRAWN_BY,
        )

    def _append_terminal(self, generation: Generation, terminal: Terminal, saved: bool) -> None:  # noqa: FBT001
        """Append the terminal. A follower that fails must not keep the generation alive."""
        if not saved:
            terminal = terminal.model_copy(update={"saved": False})
        failure = generation.failure
        try:
            generation.end(terminal)
        except Exception as error:  # noqa: BLE001
            events.error("follower failed", id=generation.id, failure=error)
        self._on_ended(generation)
        self._report.ended(generation, terminal, failure)


def _starter(model: Model | PushModel) -> Callable[[Request, Intake], Awaitable[None]]:
    """Return a function that calls the model with an intake."""
    if isinstance(model, PushModel):
        push = model.push
        return lambda request, intake: push(request, intake.take)
    pull = model
    return lambda request, intake: intake.pull(pull(request))


def _outcome(task: "asyncio.Task[End]") -> Outcome:
    """Return the outcome of a task that was not stopped."""
    if task.cancelled():  # the model leaked a CancelledError that nobody here raised
        return asyncio.CancelledError()
    return task.exception() or task.result()
