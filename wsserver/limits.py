"""Limits as plain data: rates, shares, a budget, and the bytes in memory. The caller has the clock.

Times are those of one clock that never goes back, in seconds. A key is forgotten once it is as if
it had never been, so that strangers cannot fill the memory with keys.
"""

import sys
from collections.abc import Callable

__all__ = [
    "CACHE",
    "GROWTH",
    "SECONDS_PER_DAY",
    "Account",
    "Bucket",
    "Budget",
    "Memory",
    "Rates",
    "Shares",
    "account_of",
    "held",
]

SECONDS_PER_DAY = 86_400
SWEEP = 1024  # keys between two looks for those that can be forgotten
GROWTH = 2  # a network has this many times the limit of each network in it: some share one fairly
SHARE = 1 / 8  # of the free memory for one account: eight that take all leave half for others

Account = tuple[str, ...]
"""Whose limits count: the key of a principal, or the keys of an address and of the networks around
it, the narrowest first. Each key has :data:`GROWTH` times the limit of the one before it, so that
one customer with many networks gets a few shares and not all."""

CACHE: Account = ()
"""The account of what nobody needs right now, and what can be read again or be forgotten."""


class Bucket:
    """A token bucket: ``burst`` at once, ``rate`` per second in the long run."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at = now

    def wait(self, now: float) -> float:
        """Return the seconds until there is a token; 0 if there is one."""
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        return 0.0 if self._left >= 1 else (1 - self._left) / self.rate

    def take(self, now: float) -> float:
        """Take a token; return 0, or the seconds until there is one, and take none."""
        wait = self.wait(now)
        if not wait:
            self._left -= 1
        return wait

    def charge(self, amount: float, now: float) -> None:
        """Take an amount that is known only afterwards; the bucket may then owe some."""
        self._left = min(self.burst, self._left + (now - self._at) * self.rate) - amount
        self._at = now

    def owed(self, now: float) -> float:
        """Return the seconds until the bucket owes nothing."""
        return max(0.0, -(self._left + (now - self._at) * self.rate) / self.rate)

    def full(self, now: float) -> bool:
        """Whether the bucket is as good as new."""
        return self._left + (now - self._at) * self.rate >= self.burst


class Rates:
    """A bucket for each key of an account."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, Bucket] = {}
        self._sweep_at = SWEEP

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, account: Account, now: float) -> float:
        """Return the seconds until each key has a token; 0 if each has one."""
        buckets = map(self._buckets.get, account)
        return max((bucket.wait(now) for bucket in buckets if bucket is not None), default=0.0)

    def take(self, account: Account, now: float) -> float:
        """Take a token of each key, or none; see :meth:`Bucket.take`."""
        buckets = self._of(account, now)
        wait = max((bucket.wait(now) for bucket in buckets), default=0.0)
        if not wait:
            for bucket in buckets:
                bucket.take(now)
        return wait

    def charge(self, account: Account, amount: float, now: float) -> None:
        """Take an amount of each key; see :meth:`Bucket.charge`."""
        for bucket in self._of(account, now):
            bucket.charge(amount, now)

    def owed(self, account: Account, now: float) -> float:
        """Return the seconds until no key owes anything."""
        buckets = map(self._buckets.get, account)
        return max((bucket.owed(now) for bucket in buckets if bucket is not None), default=0.0)

    def _of(self, account: Account, now: float) -> list[Bucket]:
        return [self._bucket(key, level, now) for level, key in enumerate(account)]

    def _bucket(self, key: str, level: int, now: float) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:
                self._sweep(now)
            more = GROWTH**level
            bucket = self._buckets[key] = Bucket(self._rate * more, self._burst * more, now)
        return bucket

    def _sweep(self, now: float) -> None:
        self._buckets = {key: b for key, b in self._buckets.items() if not b.full(now)}
        self._sweep_at = max(SWEEP, 2 * len(self._buckets))


class Shares:
    """Counts what each account holds, of which none may hold more than ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def full(self, account: Account) -> bool:
        """Whether the account holds all that it may."""
        return any(
            self._held.get(key, 0) >= self.limit * GROWTH**level
            for level, key in enumerate(account)
        )

    def take(self, account: Account) -> bool:
        """Take one more for the account; False, and nothing taken, if it may have no more."""
        if self.full(account):
            return False
        for key in account:
            self._held[key] = self._held.get(key, 0) + 1
        return True

    def give(self, account: Account) -> None:
        """Give one back."""
        for key in account:
            _lower(self._held, key, 1)


class Memory:
    """The bytes that this process holds for its clients, by account.

    Whatever a client can make grow is taken here before it is kept, and given back when it is let
    go: buffers, queues, conversations, replies. Take and give the same size and the same account:
    keep both beside the data, as :func:`held` of a text may change, and the account of a socket
    does when its client says who it is. A refusal changes nothing; the caller then tells the client
    so (``limit``, or close code 1013).

    What nobody needs right now belongs to the account :data:`CACHE`, and whoever keeps such data
    registers with :meth:`shed_by`: it is dropped before anything in use is refused. To go from use
    to a cache, give the size back and take it again for the other account.

    An account may hold :data:`SHARE` of what is still free beside the caches, and so no number of
    accounts takes everything: the more they hold, the less each of them gets.

    Args:
        limit: bytes for all accounts together.
        share: part of the free bytes that one account may hold.

    Attributes:
        used: bytes that are taken, those of the caches included.
        cached: bytes of the caches.
    """

    def __init__(self, limit: int, share: float = SHARE) -> None:
        self.limit = limit
        self.used = 0
        self.cached = 0
        self._share = share
        self._held: dict[str, int] = {}
        self._caches: list[Callable[[int], None]] = []

    def __len__(self) -> int:
        return len(self._held)

    def shed_by(self, shed: Callable[[int], None]) -> None:
        """Register a cache.

        Args:
            shed: called with a number of bytes; drops at least so many, those used longest ago
                first, or all that there are, and gives them back to the account :data:`CACHE`.
        """
        self._caches.append(shed)

    def take(self, account: Account, size: int) -> bool:
        """Take bytes; False, and none taken, if the account or the process may have no more."""
        if size <= 0:
            return True
        free = self.limit - self.used + self.cached
        if size > free:
            return False
        for level, key in enumerate(account):
            if self._held.get(key, 0) + size > free * self._share * GROWTH**level:
                return False
        for shed in self._caches:
            if self.used + size <= self.limit:
                break
            shed(self.used + size - self.limit)
        if self.used + size > self.limit:
            return False
        self.used += size
        if account == CACHE:
            self.cached += size
        for key in account:
            self._held[key] = self._held.get(key, 0) + size
        return True

    def give(self, account: Account, size: int) -> None:
        """Give bytes back that were taken for an account."""
        if size <= 0:
            return
        self.used -= size
        if account == CACHE:
            self.cached -= size
        for key in account:
            _lower(self._held, key, size)


def account_of(principal: str) -> Account:
    """Return the account of a principal, for what is known by its owner's name alone."""
    return (f"principal {principal}",)


def held(data: str | bytes | bytearray) -> int:
    """Return the bytes that Python holds for a text or for bytes.

    One character beyond U+FFFF makes each character of a ``str`` take four bytes.
    """
    return sys.getsizeof(data)


def _lower(counts: dict[str, int], key: str, by: int) -> None:
    """Lower a count, and forget the key at 0."""
    left = counts[key] - by
    if left:
        counts[key] = left
    else:
        del counts[key]


class _Spending:
    __slots__ = ("reserved", "spent")

    def __init__(self, spent: int) -> None:
        self.spent = spent
        self.reserved = 0


class Budget:
    """What each owner may spend on one day: tokens, or microdollars.

    What a reply may use is reserved as it begins and settled as it ends, so that many at once
    cannot spend what each of them was told is left. What was spent before this process ran comes
    from the store, see :meth:`learn`.

    Args:
        per_day: how much; 0 sets no limit, and nothing is counted.
    """

    def __init__(self, per_day: int) -> None:
        self._per_day = per_day
        self._day = 0
        self._accounts: dict[str, _Spending] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def knows(self, owner: str, day: int) -> bool:
        """Whether :meth:`learn` need not be called first."""
        self._turn(day)
        return not self._per_day or owner in self._accounts

    def learn(self, owner: str, day: int, spent: int) -> None:
        """Take over what an owner has spent on a day, unless it is known by now."""
        self._turn(day)
        if self._per_day:
            self._accounts.setdefault(owner, _Spending(spent))

    def left(self, owner: str) -> int | None:
        """Return what an owner who is known can still reserve; None without a limit."""
        if not self._per_day:
            return None
        account = self._accounts[owner]
        return max(0, self._per_day - account.spent - account.reserved)

    def reserved(self, owner: str) -> int:
        """Return what is set aside for an owner's replies that run."""
        return self._accounts[owner].reserved if owner in self._accounts else 0

    def reserve(self, owner: str, amount: int) -> None:
        """Set an amount aside for a reply that begins."""
        if self._per_day and owner in self._accounts:
            self._accounts[owner].reserved += amount

    def settle(self, owner: str, reserved: int, spent: int) -> None:
        """Put what a reply has really used in the place of what was reserved for it."""
        account = self._accounts.get(owner)
        if account is not None:
            account.reserved -= reserved
            account.spent += spent

    def _turn(self, day: int) -> None:
        """Begin a new day, on which only what is still reserved counts.

        A clock that steps back begins no day: the later day goes on.
        """
        if day <= self._day:
            return
        self._day = day
        for owner, account in list(self._accounts.items()):
            account.spent = 0
            if not account.reserved:
                del self._accounts[owner]
