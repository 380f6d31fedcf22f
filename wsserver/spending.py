"""What each owner may still spend today, in tokens and in dollars."""

import time

from wsserver.errors import Code, Refused
from wsserver.limits import SECONDS_PER_DAY, Budget
from wsserver.prices import Price, Prices, Spent
from wsserver.settings import Settings
from wsserver.stores.base import Store, day_of

LEAST_REPLY = 64  # output tokens; a reply starts only if the rest of the day pays for so many


class Spending:
    """The budgets of a day in UTC.

    Args:
        settings: the limits and the prices.
        store: knows what each owner spent before this process ran.
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
        """Ask the store what an owner has spent today, unless it is known.

        Raises:
            StoreError: the store cannot tell.
        """
        while not self.knows(owner, day := day_of(time.time())):
            spent = await self._store.spent(owner, day)
            self._tokens.learn(owner, day, spent.tokens)
            self._microdollars.learn(owner, day, spent.microdollars)

    def knows(self, owner: str, day: int) -> bool:
        """Whether :meth:`learn` need not ask the store on that day."""
        tokens = self._tokens.knows(owner, day)
        return self._microdollars.knows(owner, day) and tokens

    def allow(self, owner: str, model: str, wanted: int) -> int:
        """Return how many of the wanted output tokens a reply may have.

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
            message = f"The rest of today's {name} is reserved for replies that run."
            raise Refused(Code.LIMIT, message)
        tomorrow = SECONDS_PER_DAY - time.time() % SECONDS_PER_DAY
        message = f"Too few of today's {name} are left for a reply."
        raise Refused(Code.QUOTA, message, retry_after=tomorrow)

    def reserve(self, owner: str, likely: Spent) -> None:
        """Reserve what a reply may cost."""
        self._tokens.reserve(owner, likely.tokens)
        self._microdollars.reserve(owner, likely.microdollars)

    def reserved(self, owner: str) -> Spent:
        """Return what is reserved for an owner's replies."""
        return Spent(self._tokens.reserved(owner), self._microdollars.reserved(owner))

    def settle(self, owner: str, likely: Spent, spent: Spent) -> None:
        """Replace what was reserved for a reply by what the reply has cost."""
        self._tokens.settle(owner, likely.tokens, spent.tokens)
        self._microdollars.settle(owner, likely.microdollars, spent.microdollars)
