"""Reports generations to the operator: metrics, log events, the health of the model's API."""

import asyncio
import logging

from wsserver.errors import OUTAGE, UPSTREAM, Code, ModelError
from wsserver.hub.live import Generation
from wsserver.logs import log as events
from wsserver.logs import logger
from wsserver.protocol import Done, Error, Terminal
from wsserver.telemetry import Metrics

FAILURES = 5  # in a row: then the model's API counts as failing
FAILING = 30.0  # seconds after the last failure in which the API counts as failing


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

        This ends by itself after :data:`FAILING` seconds: a server without prompts would otherwise
        never recover.
        """
        recently = self._loop.time() - self._failed < FAILING
        return self._failures >= FAILURES and recently

    def started(self) -> None:
        """Report the start of a call of the model."""
        self._metrics.generation_began()

    def closed(self, generation: Generation) -> None:
        """Report that a stopped model has closed its request."""
        self._metrics.stop_took(self._loop.time() - generation.stopped)

    def answered(self, generation: Generation, terminal: Terminal) -> None:
        """Update the health of the model's API from the end of a reply."""
        if isinstance(terminal, Error) and terminal.code in OUTAGE:
            self._failures += 1
            self._failed = self._loop.time()
        elif generation.began is not None and (isinstance(terminal, Error) or generation.log.seq):
            self._failures = 0

    def ended(
        self, generation: Generation, terminal: Terminal, failure: BaseException | None
    ) -> None:
        """Count an ended generation, and log its event. The event has no text of the reply."""
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
    """Return the level and the values of the log event for the end of a generation."""
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
            "advice": failure.advice,
            "detail": failure.detail if logger.isEnabledFor(logging.DEBUG) else None,
        }
        if failure.__cause__ is not None:
            about["cause"] = type(failure.__cause__).__name__
    return level, about
