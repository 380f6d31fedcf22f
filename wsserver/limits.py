"""How much of what one may have: rates, shares and a budget. Plain data; the caller has the clock.

Times are those of one clock that never goes back, in seconds. What is kept per key is forgotten
once it is as if it had never been, so that strangers cannot fill the memory with keys.
"""

__all__ = ["SECONDS_PER_DAY", "Bucket", "Budget", "Rates", "Shares"]

SECONDS_PER_DAY = 86_400
SWEEP = 1024  # keys between two looks for those that can be forgotten


class Bucket:
    """A token bucket: ``burst`` at once, ``rate`` per second in the long run."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at = now

    def take(self, now: float) -> float:
        """Take one; return 0, or the seconds until there is one, and take none."""
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self.rate

    def charge(self, amount: float, now: float) -> None:
        """Take an amount that is known only afterwards; the bucket may then owe some."""
        self._left = min(self.burst, self._left + (now - self._at) * self.rate) - amount
        self._at = now

    def owed(self, now: float) -> float:
        """Return the seconds until the bucket owes nothing."""
        return max(0.0, -(self._left + (now - self._at) * self.rate) / self.rate)

    def full(self, now: float) -> bool:
        """Whether it is as good as new."""
        return self._left + (now - self._at) * self.rate >= self.burst


class Rates:
    """A bucket for each key."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, Bucket] = {}
        self._sweep_at = SWEEP

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, now: float) -> float:
        """Take one of the key's; see :meth:`Bucket.take`."""
        return self._of(key, now).take(now)

    def charge(self, key: str, amount: float, now: float) -> None:
        """Take an amount of the key's; see :meth:`Bucket.charge`."""
        self._of(key, now).charge(amount, now)

    def owed(self, key: str, now: float) -> float:
        """Return the seconds until the key owes nothing."""
        bucket = self._buckets.get(key)
        return 0.0 if bucket is None else bucket.owed(now)

    def _of(self, key: str, now: float) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:
                self._sweep(now)
            bucket = self._buckets[key] = Bucket(self._rate, self._burst, now)
        return bucket

    def _sweep(self, now: float) -> None:
        self._buckets = {key: b for key, b in self._buckets.items() if not b.full(now)}
        self._sweep_at = max(SWEEP, 2 * len(self._buckets))


class Shares:
    """Counts what each key holds, of which none may hold more than ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def full(self, key: str) -> bool:
        """Whether the key holds all that it may."""
        return self._held.get(key, 0) >= self.limit

    def take(self, key: str) -> bool:
        """Take one more for the key; False, and nothing taken, if it may have no more."""
        if self.full(key):
            return False
        self._held[key] = self._held.get(key, 0) + 1
        return True

    def give(self, key: str) -> None:
        """Give one back."""
        left = self._held[key] - 1
        if left:
            self._held[key] = left
        else:
            del self._held[key]


class _Account:
    __slots__ = ("reserved", "spent")

    def __init__(self, spent: int) -> None:
        self.spent = spent
        self.reserved = 0


class Budget:
    """Tokens that each owner may spend on one day.

    What a reply may use is reserved as it begins and settled as it ends, so that many at once
    cannot spend what each of them was told is left. What was spent before this process ran comes
    from the store, see :meth:`learn`.

    Args:
        per_day: tokens; 0 sets no limit, and nothing is counted.
    """

    def __init__(self, per_day: int) -> None:
        self._per_day = per_day
        self._day = 0
        self._accounts: dict[str, _Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def knows(self, owner: str, day: int) -> bool:
        """Whether :meth:`learn` need not be called first."""
        self._turn(day)
        return not self._per_day or owner in self._accounts

    def learn(self, owner: str, day: int, spent: int) -> None:
        """Take over what an owner has spent on a day, unless it is known by now."""
        self._turn(day)
        self._accounts.setdefault(owner, _Account(spent))

    def left(self, owner: str) -> int | None:
        """Return what an owner who is known can still reserve; None without a limit."""
        if not self._per_day:
            return None
        account = self._accounts[owner]
        return max(0, self._per_day - account.spent - account.reserved)

    def reserved(self, owner: str) -> int:
        """Return what is set aside for an owner's replies that run."""
        return self._accounts[owner].reserved if owner in self._accounts else 0

    def reserve(self, owner: str, tokens: int) -> None:
        """Set tokens aside for a reply that begins."""
        if self._per_day and owner in self._accounts:
            self._accounts[owner].reserved += tokens

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
