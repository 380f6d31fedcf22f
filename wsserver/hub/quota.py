"""Limits on what each owner may keep in the store."""

import asyncio

from wsserver.errors import Code, Refused
from wsserver.settings import Settings
from wsserver.stores.base import Amounts, Store

FRESH = 10.0  # seconds for which an answer of the store is cached; prompts have a rate limit
SWEEP = 1024  # answers after which old ones are dropped


class Quota:
    """Refuses prompts of owners who have reached a limit of the store."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, tuple[float, Amounts]] = {}  # by owner, with the time of the answer

    def knows(self, owner: str, *, new: bool) -> bool:
        """Whether :meth:`check` would pass without a call of the store."""
        known = self._known.get(owner)
        if known is None or self._loop.time() - known[0] >= FRESH:
            return False
        return self._over(known[1], new=new) is None

    async def check(self, owner: str, *, new: bool) -> None:
        """Check that an owner may store one more prompt.

        Raises:
            Refused: the owner has to delete something first.
            StoreError: the store failed.
        """
        if self.knows(owner, new=new):
            return
        now, stored = self._loop.time(), await self._store.amounts(owner)
        if len(self._known) >= SWEEP:
            self._known = {k: v for k, v in self._known.items() if now - v[0] < FRESH}
        self._known[owner] = now, stored
        if (message := self._over(stored, new=new)) is not None:
            raise Refused(Code.LIMIT, message, retryable=False)

    def _over(self, stored: Amounts, *, new: bool) -> str | None:
        """Return the message for an owner at a limit; None if the owner is below all limits."""
        size, count = self._settings.bytes_per_principal, self._settings.conversations_per_principal
        if stored.bytes >= size:
            return (
                f"Your conversations take {stored.bytes} bytes; {size} are allowed "
                "(bytes_per_principal). Delete some."
            )
        if new and stored.conversations >= count:
            return (
                f"You have {stored.conversations} conversations; {count} are allowed "
                "(conversations_per_principal). Delete some."
            )
        return None
