"""What each owner may still spend today: tokens and money, reserved before and settled after."""

import time

from wsserver.errors import Code, Refused
from wsserver.limits import SECONDS_PER_DAY, Budget
from wsserver.prices import Price, Prices, Spent
from wsserver.settings import Settings
from wsserver.stores.base import Store, day_of

__all__ = ["Spending"]

LEAST_REPLY = 64  # output tokens of a day's rest that are worth a reply


class Spending:
    """The budgets of a day, which is one of UTC.

    Args:
        settings: the limits and the prices.
        store: what knows what was spent before this process ran.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._prices = Prices(settings.prices)
        self._store = store
        self._tokens = Budget(settings.tokens_per_day)
        self._microdollars = Budget(round(settings.dollars_per_day * 1e6))

    def price(self, model: str) -> Price:
        """Return the price of a model."""
        return self._prices.of(model)

    async def learn(self, owner: str) -> None:
        """Find out what an owner has spent today, if it is not known.

        Raises:
            StoreError: the store cannot tell.
        """
        while not self._known(owner, day := day_of(time.time())):
            spent = await self._store.spent(owner, day)
            self._tokens.learn(owner, day, spent.tokens)
            self._microdollars.learn(owner, day, spent.microdollars)

    def _known(self, owner: str, day: int) -> bool:
        known = [budget.knows(owner, day) for budget in (self._tokens, self._microdollars)]
        return all(known)

    def allow(self, owner: str, model: str, wanted: int) -> int:
        """Return how many output tokens a reply may have, of those that are wanted.

        Raises:
            Refused: too little of the day is left.
        """
        dollars = self.price(model).output
        for budget, each, name in (
            (self._tokens, 1.0, "tokens"),
            (self._microdollars, dollars, "dollars"),
        ):
            left = budget.left(owner)
            if left is None or not each:
                continue
            affordable = int(left / each)
            if affordable < LEAST_REPLY:
                self._refuse(name, reserved=budget.reserved(owner) > 0)
            wanted = min(wanted, affordable)
        return wanted

    @staticmethod
    def _refuse(name: str, *, reserved: bool) -> None:
        if reserved:
            message = f"What is left of today's {name} is set aside for replies that run."
            raise Refused(Code.LIMIT, message)
        tomorrow = SECONDS_PER_DAY - time.time() % SECONDS_PER_DAY
        message = f"Too few of today's {name} are left for a reply."
        raise Refused(Code.QUOTA, message, retry_after=tomorrow)

    def reserve(self, owner: str, likely: Spent) -> None:
        """Set aside what a reply may cost."""
        self._tokens.reserve(owner, likely.tokens)
        self._microdollars.reserve(owner, likely.microdollars)

    def reserved(self, owner: str) -> Spent:
        """Return what is set aside for an owner's replies."""
        return Spent(self._tokens.reserved(owner), self._microdollars.reserved(owner))

    def settle(self, owner: str, likely: Spent, spent: Spent) -> None:
        """Put what a reply has cost in the place of what was set aside for it."""
        self._tokens.settle(owner, likely.tokens, spent.tokens)
        self._microdollars.settle(owner, likely.microdollars, spent.microdollars)
