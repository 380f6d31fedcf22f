"""What accounts use, against their limits on prompts. This module does no I/O."""

from collections.abc import Callable

from wsserver.errors import Code, Refused
from wsserver.hub.live import Generation
from wsserver.limits import SECONDS_PER_DAY, Account, Budget, Rates, Shares
from wsserver.prices import Price, Spent
from wsserver.protocol import Prompt
from wsserver.settings import Settings
from wsserver.stores.base import Used, day_of

LEAST_REPLY = 64  # output tokens that the rest of the budget must allow before a reply starts


class Tally:
    """Counts the replies, prompts, tokens and dollars of accounts and owners.

    Args:
        settings: the limits.
        price: returns the price of a model.
        now: returns the time in seconds, for rates.
        today: returns the time in seconds since the epoch, for daily budgets.
        on_booked: called with each generation that is counted.
    """

    def __init__(
        self,
        settings: Settings,
        price: Callable[[str], Price],
        now: Callable[[], float],
        today: Callable[[], float],
        on_booked: Callable[[Generation], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._price = price
        self._now = now
        self._today = today
        self._on_booked = on_booked
        self.generations = Shares(settings.generations_per_principal)
        self.prompts = Rates(settings.prompts_per_minute / 60, settings.prompts_per_minute)
        self.budgets = {
            "tokens": Budget(settings.tokens_per_day),
            "dollars": Budget(round(settings.dollars_per_day * 1e6)),
        }

    @classmethod
    def of(
        cls,
        used: Used,
        owner: str,
        account: Account,
        *,
        settings: Settings,
        price: Callable[[str], Price],
        on_booked: Callable[[Generation], None],
    ) -> "Tally":
        """Return the tally for one decision of a cluster.

        Args:
            used: what the owner and the account use on all nodes.
            owner: the owner of the prompt.
            account: the account whose limits apply.
            settings: the limits.
            price: returns the price of a model.
            on_booked: called with each generation that is counted.
        """
        tally = cls(settings, price, lambda: used.now, lambda: used.now, on_booked)
        tally.generations.restore(used.held)
        tally.prompts.restore(account, used.prompts)
        amounts = zip(used.spent, used.reserved, strict=True)
        for budget, (spent, reserved) in zip(tally.budgets.values(), amounts, strict=True):
            budget.learn(owner, day_of(used.now), spent)
            budget.reserve(owner, reserved)
        return tally

    def knows(self, owner: str) -> bool:
        """Whether the owner's spending of today is known; else call :meth:`learn`."""
        day = day_of(self._today())
        known = [budget.knows(owner, day) for budget in self.budgets.values()]  # calls all of them
        return all(known)

    def learn(self, owner: str, day: int, spent: Spent) -> None:
        """Set the amounts that an owner has spent on a day, unless they are known by now."""
        for budget, amount in zip(self.budgets.values(), spent, strict=True):
            budget.learn(owner, day, amount)

    def reserved(self, owner: str) -> Spent:
        """Return the reserved cost of an owner's generations that have not ended."""
        return Spent(*(budget.reserved(owner) for budget in self.budgets.values()))

    def check(self, account: Account, spare: int = 0) -> None:
        """Check that an account may send a prompt now.

        Args:
            account: the account of the prompt.
            spare: number of prompts that the limits have to leave for later.

        Raises:
            Refused: the account is at a limit.
        """
        if self.generations.full(account, spare):
            raise Refused(
                Code.LIMIT,
                "You already have your maximum number of replies at once. Wait for the end of one.",
            )
        if wait := self.prompts.wait(account, self._now(), 1 + spare):
            raise Refused(
                Code.LIMIT,
                "You have sent too many messages in a minute. Wait a little, and try again.",
                retry_after=wait,
            )

    def allow(self, prompt: Prompt, owner: str, model: str) -> int:
        """Return the number of output tokens that the reply to a prompt may have.

        Raises:
            Refused: too little of the owner's daily budget is left.
        """
        settings = self._settings
        wanted = min(prompt.max_tokens or settings.max_tokens, settings.max_tokens_limit)
        prices = 1, self._price(model).output
        for (name, budget), price in zip(self.budgets.items(), prices, strict=True):
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
            tomorrow = SECONDS_PER_DAY - self._today() % SECONDS_PER_DAY
            message = f"Too few of today's {name} are left for a reply. Try again tomorrow."
            raise Refused(Code.QUOTA, message, retry_after=tomorrow)
        return wanted

    def book(self, generation: Generation) -> None:
        """Count an accepted generation, and reserve its highest cost."""
        generation.reserved = self._price(generation.model).highest(
            generation.input_tokens, generation.allowance
        )
        self.prompts.consume(generation.account, self._now())
        self.generations.acquire(generation.account)
        for budget, amount in zip(self.budgets.values(), generation.reserved, strict=True):
            budget.reserve(generation.owner, amount)
        self._on_booked(generation)

    def settle(self, generation: Generation) -> None:
        """Release the reservation for a generation, and count its cost."""
        self.generations.release(generation.account)
        amounts = zip(generation.reserved, generation.spent, strict=True)
        for budget, (reserved, spent) in zip(self.budgets.values(), amounts, strict=True):
            budget.settle(generation.owner, reserved, spent)
