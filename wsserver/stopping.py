"""A ``stop`` and its answer, which comes when all that it stops has ended."""

from collections.abc import Callable

from wsserver.generation import Log
from wsserver.live import Generation
from wsserver.protocol import Stop, Terminal

__all__ = ["Stopping"]


class Stopping:
    """A ``stop`` whose generations have not all ended. A follower of each of their logs.

    Args:
        stop: the frame.
        answer: called once all have ended, with the ids of those that were stopped.
    """

    __slots__ = ("_answer", "_ids", "_logs", "_pending", "stop")

    def __init__(self, stop: Stop, answer: Callable[[Stop, list[str]], None]) -> None:
        self.stop = stop
        self._answer = answer
        self._ids: list[str] = []
        self._logs: list[Log[Terminal]] = []
        self._pending = 1  # until `settle` is called for the frame itself

    def expect(self) -> None:
        """Wait for one more prompt, which is not accepted yet."""
        self._pending += 1

    def follow(self, generation: Generation) -> None:
        """Wait for the end of a generation."""
        self._pending += 1
        self._ids.append(generation.id)
        self._logs.append(generation.log)
        generation.log.followers.append(self)

    def wake(self) -> None:
        """A generation has ended, if its log has a terminal."""
        for ended in [one for one in self._logs if one.terminal is not None]:
            self._logs.remove(ended)
            ended.followers.remove(self)
            self.settle()

    def settle(self) -> None:
        """One thing less to wait for; answer if it was the last."""
        self._pending -= 1
        if not self._pending:
            self._answer(self.stop, self._ids)
