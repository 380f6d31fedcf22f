"""Prepares a model before its first prompt: imports, and a connection to its API."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from wsserver.errors import ConfigError
from wsserver.logs import log
from wsserver.models.base import Model, PushModel


class Readiness:
    """Calls ``prepare`` and ``warm`` of a model that has them, in tasks of their own."""

    def __init__(self, model: Model | PushModel, *, warm: bool) -> None:
        self._methods = {
            name: method
            for name in (("prepare", "warm") if warm else ("prepare",))
            if inspect.iscoroutinefunction(method := getattr(model, name, None))
            and not isinstance(model, type)
        }
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def prepare(self) -> None:
        """Begin to prepare the model."""
        self._start("prepare")

    async def prepared(self) -> None:
        """Wait until the preparation has ended or failed."""
        if (preparing := self._tasks.get("prepare")) is not None:
            await asyncio.wait({preparing})

    def warm(self) -> None:
        """Start to open a connection, unless that is already going on."""
        self._start("warm")

    async def close(self) -> None:
        """Cancel the tasks."""
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    def _start(self, name: str) -> None:
        running = self._tasks.get(name)
        if name in self._methods and (running is None or running.done()):
            task = asyncio.get_running_loop().create_task(_attempt(self._methods[name]))
            self._tasks[name] = task


async def _attempt(work: Callable[[], Awaitable[Any]]) -> None:
    """Await the work, and log its failure. The next prompt has the same failure, and reports it."""
    try:
        await work()
    except ConfigError as error:
        log.error("model not ready", reason=str(error))
    except Exception as error:  # noqa: BLE001
        log.error("model not ready", failure=error)
