"""Limits of accounts and owners: prompts, generations, reads, storage, tokens and dollars."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from wsserver.errors import Code, Refused
from wsserver.hub.elsewhere import Elsewhere
from wsserver.hub.live import Generation
from wsserver.hub.quota import Quota
from wsserver.hub.tally import Tally
from wsserver.limits import Account, Rates
from wsserver.prices import Price, Prices, Spent
from wsserver.settings import Settings
from wsserver.stores.base import Store, day_of

READ_RATE = 2**20  # bytes/s of histories and lists for one account over time
READ_BURST = 2**24  # bytes of histories and lists at once; a browser with many tabs reads less


class Accounts:
    """Checks the limits, and counts what each account uses."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._reads = Rates(READ_RATE, READ_BURST)
        self._quota = Quota(store, settings)
        self._store = store
        self._prices = Prices(settings.prices)
        # What this server has counted by itself. The nodes of a cluster count in the store.
        self._tally = Tally(settings, self.price, self._loop.time, store.now)
        self.elsewhere: Elsewhere | None = None  # the other nodes

    def __len__(self) -> int:
        """Return the number of account keys with a running or waiting generation."""
        return len(self._tally.generations)

    def reserved(self, owner: str) -> Spent:
        """Return the reserved cost of an owner's generations that have not ended."""
        return self._tally.reserved(owner)

    def price(self, model: str) -> Price:
        """Return the price of a model."""
        return self._prices.of(model)

    # Reading.

    def check_reads(self, account: Account) -> None:
        """Check that an account may read histories and lists now.

        Raises:
            Refused: the account has read too much.
        """
        if wait := self._reads.owed(account, self._loop.time()):
            message = (
                "You have read too much history in a short time. Wait a little, and try again."
            )
            raise Refused(Code.LIMIT, message, retry_after=wait)

    def charge_reads(self, account: Account, size: int) -> None:
        """Charge an account for bytes that it made the server read or send."""
        self._reads.charge(account, size, self._loop.time())

    # Prompts.

    def check(self, account: Account) -> None:
        """Check that an account may send a prompt now, as far as this server knows by itself.

        Raises:
            Refused: the account is at a limit.
        """
        self._tally.check(account)

    def tally_now(self, owner: str, *, new: bool) -> Tally | None:
        """Return what :meth:`tally` would, if the store need not be read; else None."""
        at_hand = self.elsewhere is None and self._tally.knows(owner)
        return self._tally if at_hand and self._quota.knows(owner, new=new) else None

    @contextlib.asynccontextmanager
    async def tally(
        self, owner: str, account: Account, generation: str, *, new: bool
    ) -> AsyncIterator[Tally]:
        """Check the owner's room in the store, and return what the owner and the account use.

        A generation has to be accepted without an ``await`` in between.

        Args:
            owner: the owner of the generation.
            account: the account whose limits apply.
            generation: the id of the generation.
            new: the generation is in a new conversation.

        Raises:
            Refused: the owner has to delete something first.
            Running: another node runs the generation.
            StoreError: the store failed.
        """
        await self._quota.check(owner, new=new)
        if self.elsewhere is not None:
            async with self.elsewhere.use(owner, account, generation) as use:

                def reserve(booked: Generation) -> None:
                    use.reserve(booked, tally.prompts.left(account))

                tally = Tally.of(
                    use.used,
                    owner,
                    account,
                    settings=self._settings,
                    price=self.price,
                    on_booked=reserve,
                )
                yield tally
            return
        while not self._tally.knows(owner):
            day = day_of(self._store.now())
            self._tally.learn(owner, day, await self._store.spent(owner, day))
        yield self._tally

    def settle(self, generation: Generation) -> None:
        """Release the reservation for a generation, and count its cost."""
        if self.elsewhere is None:
            self._tally.settle(generation)
        elif generation.record is not None and generation.record.lost:  # else the store does it
            self.elsewhere.unreserve(generation)
