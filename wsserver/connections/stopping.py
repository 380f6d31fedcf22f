"""A ``stop`` frame, which is answered when all its generations have ended."""

from collections.abc import Callable
from dataclasses import dataclass, field

from wsserver.errors import Code, Refused
from wsserver.generation import Log, State
from wsserver.hub.hub import Hub
from wsserver.hub.live import Generation
from wsserver.protocol import Stop, Terminal


@dataclass(eq=False, slots=True)
class Stopping:
    """A ``stop`` whose generations have not all ended. A follower of each of their logs."""

    _hub: Hub
    frame: Stop
    _answer: Callable[["Stopping"], None]  # called once all have ended
    ids: list[str] = field(default_factory=list)  # the generations that were stopped
    # Why none was stopped: a generation that another node runs may be out of reach.
    refused: Refused = field(default_factory=lambda: Refused(Code.NOT_RUNNING))
    _logs: list[Log[Terminal]] = field(default_factory=list)
    _pending: int = 1  # until `complete_one` is called for the frame itself

    def expect(self) -> None:
        """Wait for one more prompt that is not accepted yet."""
        self._pending += 1

    def stop(self, generation: Generation) -> None:
        """Stop a generation, and wait for its end."""
        if generation.state is not State.ENDED:
            self._pending += 1
            self.ids.append(generation.id)
            self._logs.append(generation.log)
            generation.log.followers.append(self)
            self._hub.stop(generation, "client", lambda refused: self._fail(generation, refused))

    def _fail(self, generation: Generation, refused: Refused) -> None:
        """Count a generation out: the node that runs it does not answer."""
        if generation.log in self._logs:
            self._logs.remove(generation.log)
            generation.log.followers.remove(self)
            self.ids.remove(generation.id)
            self.refused = refused
            self.complete_one()

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
            self._answer(self)
