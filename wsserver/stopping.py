"""A ``stop`` frame, which is answered when all its generations have ended."""

from collections.abc import Callable
from dataclasses import dataclass, field

from wsserver.generation import Log, State
from wsserver.hub import Hub
from wsserver.live import Generation
from wsserver.protocol import Stop, Terminal


@dataclass(eq=False, slots=True)
class Stopping:
    """A ``stop`` whose generations have not all ended. A follower of each of their logs."""

    _hub: Hub
    frame: Stop
    # Called once all have ended, with the ids of the generations that were stopped.
    _answer: Callable[[Stop, list[str]], None]
    _ids: list[str] = field(default_factory=list)
    _logs: list[Log[Terminal]] = field(default_factory=list)
    _pending: int = 1  # until `complete_one` is called for the frame itself

    def expect(self) -> None:
        """Wait for one more prompt that is not accepted yet."""
        self._pending += 1

    def stop(self, generation: Generation) -> None:
        """Stop a generation, and wait for its end."""
        if generation.state is not State.ENDED:
            self._pending += 1
            self._ids.append(generation.id)
            self._logs.append(generation.log)
            generation.log.followers.append(self)
            self._hub.stop(generation, "client")

    def wake(self) -> None:
        """Count the generations whose logs have a terminal as ended."""
        for ended in [log for log in self._logs if log.terminal is not None]:
            self._logs.remove(ended)
            ended.followers.remove(self)
            self.complete_one()

    def complete_one(self) -> None:
        """Count an end, or the end of the frame's own work. Answer the frame after the last one."""
        self._pending -= 1
        if not self._pending:
            self._answer(self.frame, self._ids)
