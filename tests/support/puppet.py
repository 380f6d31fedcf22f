"""A model whose replies the test writes, piece by piece."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from tests.support.pieces import Thinking, yielded
from wsserver import Request
from wsserver.models.base import Output

BOUND = 10.0  # seconds that any wait of a test may take

__all__ = ["BOUND", "Puppet", "Reply", "Thinking", "until"]


async def until(condition: Callable[[], object]) -> None:
    """Run the event loop until a condition holds. For conditions that signal no event."""
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class Reply:
    """One call of the model."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.said: list[str] = []  # the texts that the server has taken so far
        self.closed = asyncio.Event()
        self.stubborn = False  # ignores cancellations
        self.hold: asyncio.Event | None = None  # delays the end of a cancelled call
        self._lines: asyncio.Queue[Output | BaseException | None] = asyncio.Queue()

    def say(self, *pieces: Output) -> "Reply":
        for piece in pieces:
            self._lines.put_nowait(piece)
        return self

    def heard_out(self) -> bool:
        """Whether the server has taken all pieces."""
        return self._lines.empty()

    def end(self) -> None:
        """End the generator."""
        self._lines.put_nowait(None)

    def fail(self, error: BaseException) -> None:
        self._lines.put_nowait(error)

    async def speak(self) -> AsyncGenerator[Output]:
        try:
            while True:
                try:
                    line = await self._lines.get()
                except asyncio.CancelledError:
                    if not self.stubborn:
                        raise
                    line = "said after the stop"
                if line is None:
                    return
                if isinstance(line, BaseException):
                    raise line
                if isinstance(line, str):
                    self.said.append(line)
                    yield yielded(line)
                else:
                    yield line
        finally:
            if self.hold is not None:
                await self.hold.wait()
            self.closed.set()


class Puppet:
    """A model whose replies the test controls."""

    name = "puppet"

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self._awaited: dict[int, list[asyncio.Future[Reply]]] = {}

    def __call__(self, request: Request, /) -> AsyncGenerator[Output]:
        reply = Reply(request)
        self.replies.append(reply)
        for waiter in self._awaited.pop(len(self.replies) - 1, []):
            waiter.set_result(reply)
        return reply.speak()

    async def reply(self, number: int = 0) -> Reply:
        """Wait for a call of the model; the first has number 0."""
        if len(self.replies) > number:
            return self.replies[number]
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(number, []).append(waiter)
        async with asyncio.timeout(BOUND):
            return await waiter
