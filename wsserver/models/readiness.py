"""Work for a model before its first prompt: imports, and a connection to its API."""

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
        instance = not isinstance(model, type)
        self._prepare: Callable[[], Awaitable[Any]] | None = None
        self._warm: Callable[[], Awaitable[Any]] | None = None
        if instance:
            self._prepare = _method(model, "prepare")
            self._warm = _method(model, "warm") if warm else None
        self._preparing: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Begin to prepare the model."""
        if self._prepare is not None:
            self._preparing = asyncio.get_running_loop().create_task(_attempt(self._prepare))

    async def prepared(self) -> None:
        """Wait until the model is prepared, or has failed to."""
        if self._preparing is not None:
            await asyncio.wait({self._preparing})

    def warm(self) -> None:
        """Have a connection opened, unless one is being opened."""
        if self._warm is not None and (self._warming is None or self._warming.done()):
            self._warming = asyncio.get_running_loop().create_task(_attempt(self._warm))

    async def close(self) -> None:
        """Cancel the tasks."""
        tasks = {task for task in (self._preparing, self._warming) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _method(model: Model | PushModel, name: str) -> Callable[[], Awaitable[Any]] | None:
    method = getattr(model, name, None)
    return method if inspect.iscoroutinefunction(method) else None


async def _attempt(work: Callable[[], Awaitable[Any]]) -> None:
    """Await the work, and log its failure. The next prompt has the same failure, and reports it."""
    try:
        await work()
    except ConfigError as error:
        log.error("model not ready", reason=str(error))
    except Exception as error:  # noqa: BLE001
        log.error("model not ready", failure=error)
