"""The cost of a reply, in tokens and in dollars. Cached tokens count at a fraction.

The prices of Claude are from https://platform.claude.com/docs/en/about-claude/pricing, with a cache
of five minutes. This module does no I/O.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from wsserver.content import Usage

CACHE_WRITE = 1.25  # tokens that count for one token written to a prompt cache
CACHE_READ = 0.1  # tokens that count for one token read from a prompt cache
LONG = 100_000  # input tokens; a longer input has the price `over`, if there is one
REMEMBERED = 256  # models whose prices are cached
MOST = 10**12  # tokens of one reply; a larger count is an error, and too large for a store


class Spent(NamedTuple):
    """The cost of replies."""

    tokens: int = 0
    microdollars: int = 0

    def plus(self, other: "Spent") -> "Spent":
        """Return the sum."""
        return Spent(self.tokens + other.tokens, self.microdollars + other.microdollars)

    @property
    def dollars(self) -> float:
        """The money in US dollars."""
        return self.microdollars / 1e6


NOTHING = Spent()


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens, which are microdollars per token.

    ``over`` is the price of a request with more than 100,000 input tokens, if it differs.
    """

    input: float
    output: float
    cache_write: float
    cache_read: float
    over: "Price | None" = None

    def spent(self, usage: Usage | None) -> Spent:
        """Return the cost of a reply, rounded up."""
        if usage is None:
            return NOTHING
        fresh = min(usage.input_tokens, MOST)
        output = min(usage.output_tokens, MOST)
        written = min(usage.cache_creation_input_tokens, MOST)
        read = min(usage.cache_read_input_tokens, MOST)
        price = self.at(fresh + written + read)
        tokens = fresh + written * CACHE_WRITE + read * CACHE_READ + output
        money = (
            fresh * price.input
            + written * price.cache_write
            + read * price.cache_read
            + output * price.output
        )
        return Spent(_round_up(tokens), _round_up(money))

    def highest(self, input_tokens: int, output_tokens: int) -> Spent:
        """Return the highest cost of a reply: without reads from a cache."""
        price = self.at(input_tokens)
        money = input_tokens * price.cache_write + output_tokens * price.output
        return Spent(input_tokens + output_tokens, _round_up(money))

    def at(self, input_tokens: int) -> "Price":
        """Return the price of a request with so many input tokens."""
        return self.over if self.over is not None and input_tokens > LONG else self


def _round_up(amount: float) -> int:
    # Round first, because 0.1 * 30 is a little more than 3.
    return min(math.ceil(round(amount, 6)), MOST)


FREE = Price(0, 0, 0, 0)
"""The price of a model without a known price: only tokens are counted."""

# By the beginning of the model's name; the longest match counts.
CLAUDE = {
    "claude-fable-5": Price(10, 50, 12.5, 1),
    "claude-fable-5-1": Price(10, 50, 12.5, 0.25),
    "claude-mythos-5": Price(10, 50, 12.5, 1),
    "claude-mythos-5-1": Price(10, 50, 12.5, 0.25),
    "claude-opus-5-5": Price(4, 20, 5, 0.2),
    "claude-opus-5": Price(5, 25, 6.25, 0.5),
    "claude-opus-4-8": Price(5, 25, 6.25, 0.5),
    "claude-opus-4-7": Price(5, 25, 6.25, 0.5),
    "claude-opus-4-6": Price(5, 25, 6.25, 0.5),
    "claude-opus-4-5": Price(5, 25, 6.25, 0.5),
    "claude-opus-4": Price(15, 75, 18.75, 1.5),
    "claude-sonnet-5-5": Price(2, 10, 2.5, 0.2),
    "claude-sonnet-5": Price(2, 10, 2.5, 0.2),
    "claude-sonnet-4": Price(3, 15, 3.75, 0.3),
    "claude-haiku-5-5": Price(0.1, 0.5, 0.125, 0.01, over=Price(0.5, 2.5, 0.625, 0.05)),
    "claude-haiku-4-5": Price(1, 5, 1.25, 0.1),
    # A model that is newer than this table has the highest price, so that its cost is counted.
    "claude-": Price(15, 75, 18.75, 1.5),
}


class Prices:
    """The price of each model.

    Args:
        given: ``MODEL=INPUT/OUTPUT`` or ``MODEL=INPUT/OUTPUT/WRITE/READ``, in US dollars for a
            million tokens. They override the known prices.
    """

    def __init__(self, given: Iterable[str] = ()) -> None:
        self._given = dict(map(_parsed, given))
        self.of = functools.lru_cache(REMEMBERED)(self._look_up)

    def _look_up(self, model: str) -> Price:
        """Return the price of a model. An unknown model is free."""
        if (price := self._given.get(model)) is not None:
            return price
        _, claude, rest = model.partition("claude-")  # cloud providers put a prefix before the name
        fitting = [name for name in CLAUDE if (claude + rest).startswith(name)]
        return CLAUDE[max(fitting, key=len)] if fitting else FREE


def _parsed(given: str) -> tuple[str, Price]:
    model, _, amounts = given.rpartition("=")
    input_price, output_price, *cache = map(float, amounts.split("/"))
    write, read = cache or (input_price * CACHE_WRITE, input_price * CACHE_READ)
    return model, Price(input_price, output_price, write, read)
