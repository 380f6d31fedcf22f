"""What the store needs every now and then: to forget what nobody can ask for any more."""

import asyncio
import contextlib
import time
from typing import Protocol

from wsserver.errors import Refused, StoreError
from wsserver.logs import log
from wsserver.stores.base import Store

__all__ = ["Upkeep"]

EVERY = 30.0  # seconds between two rounds
PAUSE = 0.05  # seconds between two steps of one round, in which others are served
STEP = 20  # conversations that are looked up at once


class Delete(Protocol):
    """See :meth:`wsserver.hub.Hub.delete`."""

    async def __call__(self, name: str, owner: str, /, *, before: float) -> None:
        """Delete a conversation that was last used before a time."""
        ...


class Upkeep:
    """Purges the store in small steps, and deletes conversations that were not used for long.

    Args:
        store: which.
        delete: deletes a conversation, by id and owner, with all that the process has of it, if
            the conversation was last used before a time.
        replay: seconds that ended generations outside of conversations are kept.
        retention: seconds that conversations are kept after their last use; 0 for ever.
    """

    def __init__(
        self,
        store: Store,
        delete: Delete,
        *,
        replay: float,
        retention: float,
    ) -> None:
        self._store = store
        self._delete = delete
        self._replay = replay
        self._retention = retention
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End it. Idempotent."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.round()
            except StoreError:
                pass  # whoever wants something of the store is told
            except Exception as error:  # noqa: BLE001
                log.error("store not purged", failure=error)

    async def round(self) -> None:
        """Purge once, until nothing is left to purge.

        Raises:
            StoreError: the store failed.
        """
        more = True
        while more:
            more = await self._store.purge(time.time() - self._replay)
            await asyncio.sleep(PAUSE)
        if not self._retention:
            return
        deleted = True
        while deleted:
            deleted = False
            before = time.time() - self._retention
            for owner, name in await self._store.idle(before, STEP):
                with contextlib.suppress(Refused):  # its owner uses it again, or deletes it
                    await self._delete(name, owner, before=before)
                    deleted = True
                await asyncio.sleep(PAUSE)
