"""An event loop with a clock of its own, so that the order of events depends on nothing else."""

import asyncio
import selectors
from typing import Any

__all__ = ["ClockLoop"]


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop for code without threads, sockets and processes.

    Each turn of the loop takes ``tick`` seconds of its clock. Where no task can go on, the clock
    moves to the next timer at once.

    Attributes:
        now: the time, in seconds. A test may set it forward.
        tick: the seconds that one turn takes.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.tick = 0.001
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    """Moves the clock instead of waiting."""

    def __init__(self, loop: ClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("no task can go on, and no timer is set")
        self._loop.now += max(self._loop.tick, timeout)
        return super().select(0)
