"""A lock that owners take turns with, so that one who asks for much does not starve the others."""

import asyncio
from collections import deque
from types import TracebackType

from wsserver.errors import Code, Refused

__all__ = ["FairLock"]

MOST_WAITING = 128  # of one owner; each of its sockets waits for one at a time


class FairLock:
    """Lets in one at a time: the owners in turn, and each owner's own in order.

    ::

        async with lock.of(owner):
            ...
    """

    def __init__(self) -> None:
        self._held = False
        # By owner; whoever waits first is next. None has an empty queue.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def of(self, owner: str) -> "_Turn":
        """Return a context in which an owner holds the lock."""
        return _Turn(self, owner)

    async def acquire(self, owner: str) -> None:
        """Wait for an owner's turn.

        Raises:
            Refused: as many wait for this owner as may.
        """
        if not self._held:
            self._held = True
            return
        mine = self._waiting.get(owner)
        if mine is not None and len(mine) >= MOST_WAITING:
            raise Refused(Code.LIMIT, "Too many requests of yours wait for the store.")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(owner, turn)
            else:  # its turn came as it was cancelled
                self.release()
            raise

    def release(self) -> None:
        """Let in the next one."""
        while self._waiting:
            owner = next(iter(self._waiting))
            mine = self._waiting.pop(owner)
            turn = mine.popleft()
            if mine:
                self._waiting[owner] = mine  # behind all others
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._held = False

    def _leave(self, owner: str, turn: "asyncio.Future[None]") -> None:
        mine = self._waiting.get(owner)
        if mine is not None and turn in mine:
            mine.remove(turn)
            if not mine:
                del self._waiting[owner]


class _Turn:
    __slots__ = ("_lock", "_owner")

    def __init__(self, lock: FairLock, owner: str) -> None:
        self._lock = lock
        self._owner = owner

    async def __aenter__(self) -> None:
        await self._lock.acquire(self._owner)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
