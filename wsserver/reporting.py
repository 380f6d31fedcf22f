"""What an operator learns of a generation: its metrics, its log event, the model's health."""

import asyncio
import logging

from wsserver.errors import OUTAGE, UPSTREAM, Code, ModelError
from wsserver.live import Generation
from wsserver.logs import log as events
from wsserver.protocol import Done, Error, Terminal
from wsserver.telemetry import Metrics

FAILURES = 5  # of the model's API in a row, after which the API counts as failing
FAILING = 30.0  # seconds after the last failure, in which the API counts as failing


class Reporter:
    """Reports generations."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._failures = 0  # of the model's API in a row
        self._failed = 0.0  # when the API failed last

    @property
    def upstream_failing(self) -> bool:
        """Whether the model's API has just failed several times in a row.

        The answer does not stay true by itself: a server that gets no prompts would never recover.
        """
        recently = self._loop.time() - self._failed < FAILING
        return self._failures >= FAILURES and recently

    def started(self) -> None:
        """Report that a model is asked."""
        self._metrics.generation_began()

    def closed(self, generation: Generation) -> None:
        """Report that a model which was asked to stop has closed its request."""
        self._metrics.stop_took(self._loop.time() - generation.stopped)

    def answered(self, generation: Generation, terminal: Terminal) -> None:
        """Learn from the end of a reply whether the model's API works."""
        if isinstance(terminal, Error) and terminal.code in OUTAGE:
            self._failures += 1
            self._failed = self._loop.time()
        elif generation.began is not None and (isinstance(terminal, Error) or generation.log.seq):
            self._failures = 0

    def ended(
        self, generation: Generation, terminal: Terminal, failure: BaseException | None
    ) -> None:
        """Count a generation that has ended, and log its one event, without any text of it."""
        self._metrics.generation_ended(
            terminal,
            model=generation.model,
            dollars=generation.spent.dollars,
            seconds=None if generation.began is None else generation.seconds,
            first_token=generation.first_token,
        )
        level, about = _outcome(terminal, failure)
        first_token, usage = generation.first_token, terminal.usage
        events.log(
            level,
            "generation",
            id=generation.id,
            conversation=generation.conversation_id,
            principal=generation.owner,
            model=generation.model,
            **about,
            saved=terminal.saved,
            seconds=round(generation.ended - generation.accepted, 3),
            first_token=None if first_token is None else round(first_token, 3),
            input_tokens=None if usage is None else usage.input_tokens,
            output_tokens=None if usage is None else usage.output_tokens,
            dollars=generation.spent.dollars or None,
            pieces=generation.log.seq,
        )


def _outcome(terminal: Terminal, failure: BaseException | None) -> tuple[int, dict[str, object]]:
    """Return the level and the values with which a log event tells how a generation ended."""
    if isinstance(terminal, Done):
        return logging.INFO, {"reason": terminal.reason, "by": terminal.by}
    about: dict[str, object] = {"error": terminal.code, "ref": terminal.ref}
    level = logging.INFO
    if terminal.code is Code.INTERNAL:
        level = logging.ERROR
        about["failure"] = failure
    elif terminal.code in UPSTREAM:
        level = logging.WARNING
    if isinstance(failure, ModelError):
        about |= {
            "kind": failure.kind,
            "status": failure.status,
            "request_id": failure.request_id,
        }
        if failure.__cause__ is not None:
            about["cause"] = type(failure.__cause__).__name__
    return level, about
