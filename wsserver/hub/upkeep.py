"""Regular work on the store: purge expired generations, delete old conversations."""

import asyncio
from typing import Protocol

from wsserver.errors import Refused, StoreError
from wsserver.logs import log
from wsserver.stores.base import Store

EVERY = 30.0  # seconds between two rounds
PAUSE = 0.05  # seconds between two steps of a round, so that requests do not wait
STEP = 20  # conversations that are looked up at once
MOST_SKIPPED = 1000  # conversations that one round skips before it ends


class Delete(Protocol):
    """See :meth:`wsserver.hub.hub.Hub.delete`."""

    async def __call__(self, owner: str, name: str, /, *, before: float) -> None:
        """Delete a conversation that was last used before a time."""
        ...


class Upkeep:
    """Purges the store in small steps, and deletes conversations after the retention time.

    Args:
        store: the store to purge.
        delete: deletes a conversation from the store and from memory, if it was last used before
            a time.
        replay: seconds for which ended generations outside of conversations are kept.
        retention: seconds for which conversations are kept after their last use; 0: no limit.
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
        """Stop the work. Idempotent."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.round()
            except StoreError:
                pass  # clients that need the store get the error
            except Exception as error:  # noqa: BLE001
                log.error("store not purged", failure=error)

    async def round(self) -> None:
        """Purge until nothing is left to purge, then delete old conversations.

        Raises:
            StoreError: the store failed.
        """
        more = True
        while more:
            more = await self._store.purge(self._store.now() - self._replay)
            await asyncio.sleep(PAUSE)
        if self._retention:
            await self._delete_old()

    async def _delete_old(self) -> None:
        """Delete old conversations. The next round tries the failed ones again."""
        skipped: set[tuple[str, str]] = set()  # by owner and id
        while len(skipped) < MOST_SKIPPED:
            before = self._store.now() - self._retention
            found = await self._store.idle(before, STEP + len(skipped))
            old = [key for key in found if key not in skipped]
            if not old:
                return
            for owner, name in old:
                try:
                    await self._delete(owner, name, before=before)
                except Refused:  # its owner uses it again, or deletes it
                    skipped.add((owner, name))
                except StoreError as error:
                    skipped.add((owner, name))
                    log.error("conversation not deleted", conversation=name, reason=str(error))
                await asyncio.sleep(PAUSE)
