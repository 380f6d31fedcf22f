"""A store whose calls let other tasks run, as those of a store on a disk do."""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from wsserver.stores import MemoryStore, Store

__all__ = ["YieldingStore"]

CALLS = [
    name
    for name, member in vars(Store).items()
    if inspect.iscoroutinefunction(member) and name not in {"open", "close"}
]


class YieldingStore(MemoryStore):
    """A memory store whose calls take turns of the event loop before and after the work.

    Args:
        turns: turns of the event loop before the work, and as many after it.
    """

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self.turns = turns
        self.failure: Exception | None = None  # raised by each commit
        for name in CALLS:
            setattr(self, name, self._slowly(getattr(self, name)))

    def _slowly(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def slow(*arguments: Any, **named: Any) -> Any:
            await self._pause()
            if self.failure is not None and method.__name__ == "commit":
                raise self.failure
            result = await method(*arguments, **named)
            await self._pause()
            return result

        return slow

    async def _pause(self) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)
