"""Limits of accounts and owners: prompts, generations, reads, storage, tokens and dollars."""

import asyncio
import time

from wsserver.errors import Code, Refused
from wsserver.limits import SECONDS_PER_DAY, Account, Budget, Rates, Shares
from wsserver.live import Generation
from wsserver.prices import Price, Prices, Spent
from wsserver.protocol import Prompt
from wsserver.quota import Quota
from wsserver.settings import Settings
from wsserver.stores.base import Store, day_of

READ_RATE = 2**20  # bytes/s of histories and lists for one account over time
READ_BURST = 2**24  # bytes of histories and lists at once; a browser with many tabs reads less
LEAST_REPLY = 64  # output tokens that the rest of the budget must allow before a reply starts


class Accounts:
    """Checks the limits, and counts what each account uses."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._generations = Shares(settings.generations_per_principal)
        self._prompts = Rates(settings.prompts_per_minute / 60, settings.prompts_per_minute)
        self._reads = Rates(READ_RATE, READ_BURST)
        self._quota = Quota(store, settings)
        self._store = store
        self._prices = Prices(settings.prices)
        self._budgets = {
            "tokens": Budget(settings.tokens_per_day),
            "dollars": Budget(round(settings.dollars_per_day * 1e6)),
        }

    def __len__(self) -> int:
        """Return the number of account keys with a running or waiting generation."""
        return len(self._generations)

    def reserved(self, owner: str) -> Spent:
        """Return the reserved cost of an owner's generations that have not ended."""
        return Spent(*(budget.reserved(owner) for budget in self._budgets.values()))

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

    def check(self, account: Account, live: int, spare: int = 0) -> None:
        """Check that an account may send a prompt now. This check does not use the store.

        Args:
            account: the account of the prompt.
            live: number of generations of the server that have not ended.
            spare: number of prompts that the limits have to leave for later.

        Raises:
            Refused: the server or the account is at a limit.
        """
        if live + spare >= self._settings.generations:
            raise Refused(
                Code.LIMIT,
                "The server is writing its maximum number of replies. Try again in a moment.",
            )
        if self._generations.full(account, spare):
            raise Refused(
                Code.LIMIT,
                "You already have your maximum number of replies at once. Wait for the end of one.",
            )
        if wait := self._prompts.wait(account, self._loop.time(), 1 + spare):
            raise Refused(
                Code.LIMIT,
                "You have sent too many messages in a minute. Wait a little, and try again.",
                retry_after=wait,
            )

    def knows_store(self, owner: str, *, new: bool) -> bool:
        """Whether :meth:`check_store` would pass without a call of the store."""
        return self._knows_spent(owner, day_of(time.time())) and self._quota.knows(owner, new=new)

    def _knows_spent(self, owner: str, day: int) -> bool:
        known = [budget.knows(owner, day) for budget in self._budgets.values()]  # calls all of them
        return all(known)

    async def check_store(self, owner: str, *, new: bool) -> None:
        """Check the owner's room in the store, and read the owner's spending of today.

        Raises:
            Refused: the owner has to delete something first.
            StoreError: the store failed.
        """
        await self._quota.check(owner, new=new)
        while not self._knows_spent(owner, day := day_of(time.time())):
            spent = await self._store.spent(owner, day)
            for budget, amount in zip(self._budgets.values(), spent, strict=True):
                budget.learn(owner, day, amount)

    def allow(self, prompt: Prompt, owner: str, model: str) -> int:
        """Return the number of output tokens that the reply to a prompt may have.

        Raises:
            Refused: too little of the owner's daily budget is left.
        """
        settings = self._settings
        wanted = min(prompt.max_tokens or settings.max_tokens, settings.max_tokens_limit)
        prices = 1, self.price(model).output
        for (name, budget), price in zip(self._budgets.items(), prices, strict=True):
            left = budget.left(owner)
            if left is None or not price:
                continue
            affordable = int(left / price)
            wanted = min(wanted, affordable)
            if affordable >= LEAST_REPLY:
                continue
            if budget.reserved(owner):
                message = (
                    f"The rest of today's {name} is reserved for running replies. Wait for them."
                )
                raise Refused(Code.LIMIT, message)
            tomorrow = SECONDS_PER_DAY - time.time() % SECONDS_PER_DAY
            message = f"Too few of today's {name} are left for a reply. Try again tomorrow."
            raise Refused(Code.QUOTA, message, retry_after=tomorrow)
        return wanted

    def book(self, generation: Generation) -> None:
        """Count an accepted generation, and reserve its highest cost."""
        generation.reserved = self.price(generation.model).highest(
            generation.input_tokens, generation.allowance
        )
        self._prompts.consume(generation.account, self._loop.time())
        self._generations.acquire(generation.account)
        for budget, amount in zip(self._budgets.values(), generation.reserved, strict=True):
            budget.reserve(generation.owner, amount)

    def settle(self, generation: Generation) -> None:
        """Release the reservation for a generation, and count its cost."""
        self._generations.release(generation.account)
        amounts = zip(generation.reserved, generation.spent, strict=True)
        for budget, (reserved, spent) in zip(self._budgets.values(), amounts, strict=True):
            budget.settle(generation.owner, reserved, spent)
