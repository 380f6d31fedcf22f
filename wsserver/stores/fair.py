"""A lock with one queue per owner: many requests of one owner do not delay other owners."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from wsserver.errors import Code, Refused

MOST_WAITING = 128  # requests of one owner; each socket has one at a time


class FairLock:
    """Serves some requests at a time: the owners in turn, and the requests of one owner in order.

    ::

        async with lock.of(owner):
            ...

    Args:
        places: the number of requests that are served at a time.
    """

    def __init__(self, places: int = 1) -> None:
        self._free = places
        # Queues by owner, the next owner first. No queue is empty.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """Hold the lock for an owner; see :meth:`acquire`."""
        await self.acquire(owner)
        try:
            yield
        finally:
            self.release()

    async def acquire(self, owner: str) -> None:
        """Wait for an owner's turn.

        Raises:
            Refused: the queue of the owner is full.
        """
        if self._free:
            self._free -= 1
            return
        mine = self._waiting.get(owner)
        if mine is not None and len(mine) >= MOST_WAITING:
            raise Refused(
                Code.LIMIT, "Too many of your requests wait for the store. Try again in a moment."
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(owner, turn)
            else:  # the lock was acquired just before the cancellation
                self.release()
            raise

    def release(self) -> None:
        """Pass the lock to the next request."""
        while self._waiting:
            owner = next(iter(self._waiting))
            mine = self._waiting.pop(owner)
            turn = mine.popleft()
            if mine:
                self._waiting[owner] = mine  # behind all others
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._free += 1

    def _leave(self, owner: str, turn: "asyncio.Future[None]") -> None:
        mine = self._waiting.get(owner)
        if mine is not None and turn in mine:
            mine.remove(turn)
            if not mine:
                del self._waiting[owner]
