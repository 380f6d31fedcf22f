"""An advisory lock of PostgreSQL on the tables of a store, held while the store is open."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from wsserver.errors import StoreInUse
from wsserver.logs import log

ATTEMPTS, PAUSE = 10, 0.1  # at the start, and seconds between them
AGAIN = 0.5  # seconds between two attempts after the lock was lost


class Guard:
    """Holds the lock, and takes it again after its connection was lost.

    Args:
        connect: makes a connection of asyncpg.
        shared: other holders may share the lock: the nodes of a cluster.
        place: names the database in errors.
        failures: the exceptions of ``connect`` and of statements.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Any]],
        *,
        shared: bool,
        place: str,
        failures: tuple[type[BaseException], ...],
    ) -> None:
        self._connect = connect
        self._shared = "_shared" if shared else ""
        self._place = place
        self._failures = failures
        self._connection: Any = None
        self._used = asyncio.Lock()  # a connection runs one statement at a time
        self._keeping: asyncio.Task[None] | None = None
        self.held = False

    async def take(self, connection: Any) -> None:
        """Take the lock on a connection, which the guard keeps.

        Raises:
            StoreInUse: another server holds the lock.
        """
        self._connection = connection
        # The database may not have noticed yet that the server before has died.
        for _ in range(ATTEMPTS):
            if await self._lock():
                self.held = True
                self._keeping = asyncio.create_task(self._keep())
                return
            await asyncio.sleep(PAUSE)
        raise StoreInUse(
            f"store: another server uses {self._place}; stop that server, or start this one with "
            "another database or another ?search_path="
        )

    async def release(self, within: float) -> None:
        """Release the lock, within some seconds. Idempotent."""
        self.held = False
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            keeping.cancel()
            await asyncio.wait({keeping})
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*self._failures):
                await connection.execute("SELECT pg_advisory_unlock_all()")
            with contextlib.suppress(*self._failures):
                await connection.close(timeout=within)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """Use the connection of the lock, which no other request delays.

        After a failure another connection takes its place: this one may be broken.
        """
        async with self._used:
            connection = self._connection
            try:
                yield connection
            except self._failures:
                connection.terminate()
                raise

    async def _lock(self) -> bool:
        return bool(
            await self._connection.fetchval(
                f"SELECT pg_try_advisory_lock{self._shared}(hashtext('wsserver'), "
                "hashtext(current_setting('search_path')))"
            )
        )

    async def _keep(self) -> None:
        """Take the lock again each time that it is lost."""
        while True:
            lost = asyncio.Event()
            self._connection.add_termination_listener(lambda _, lost=lost: lost.set())
            if not self._connection.is_closed():
                await lost.wait()
            self.held = False
            await self._take_again()
            self.held = True

    async def _take_again(self) -> None:
        told = False
        while True:
            with contextlib.suppress(*self._failures):
                self._connection = await self._connect()
                if await self._lock():
                    return
                await self._connection.close()
                if not told:
                    log.error("store used by another server", place=self._place)
                    told = True
            await asyncio.sleep(AGAIN)
