"""Limits as plain data: rates, shares, budgets, and the bytes in memory.

The caller passes the time, in seconds of a monotonic clock. A key whose count is back at its start
is deleted, so that clients cannot fill the memory with keys.
"""

import sys
from collections.abc import Callable, Mapping

SECONDS_PER_DAY = 86_400
SWEEP = 1024  # buckets after which full ones are deleted
GROWTH = 2  # factor between the limits of a network and of the network around it
SHARE = 1 / 8  # of the free memory for one account; eight such accounts leave over a third

Account = tuple[str, ...]
"""Whose limits apply: the key of a principal, or the keys of an address and of the networks around
it, the narrowest first. Each key has :data:`GROWTH` times the limit of the key before it, so that
one customer with many networks gets a few shares and not all."""

CACHE: Account = ()
"""The account of cached data: no client uses it now, and it can be dropped."""


class Bucket:
    """A token bucket of ``burst`` tokens that fills by ``rate`` tokens per second."""

    __slots__ = ("_at", "burst", "left", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self.left = burst
        self._at = now

    def wait(self, now: float, tokens: int = 1) -> float:
        """Return the seconds until the bucket has some tokens; 0 if it has them."""
        self.left = min(self.burst, self.left + (now - self._at) * self.rate)
        self._at = now
        return 0.0 if self.left >= tokens else (tokens - self.left) / self.rate

    def consume(self, now: float) -> float:
        """Take a token and return 0; if there is none, return the seconds until there is one."""
        wait = self.wait(now)
        if not wait:
            self.left -= 1
        return wait

    def charge(self, amount: float, now: float) -> None:
        """Take an amount that is known only afterwards. The bucket may owe tokens after that."""
        self.left = min(self.burst, self.left + (now - self._at) * self.rate) - amount
        self._at = now

    def owed(self, now: float) -> float:
        """Return the seconds until the bucket owes no tokens."""
        return max(0.0, -(self.left + (now - self._at) * self.rate) / self.rate)

    def full(self, now: float) -> bool:
        """Whether the bucket has all its tokens."""
        return self.left + (now - self._at) * self.rate >= self.burst


class Rates:
    """A bucket for each key of an account."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, Bucket] = {}
        self._sweep_at = SWEEP

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, account: Account, now: float, tokens: int = 1) -> float:
        """Return the seconds until each key has some tokens; 0 if each has them."""
        buckets = map(self._buckets.get, account)
        waits = (bucket.wait(now, tokens) for bucket in buckets if bucket is not None)
        return max(waits, default=0.0)

    def consume(self, account: Account, now: float) -> float:
        """Take a token from each key's bucket, or none from any; see :meth:`Bucket.consume`."""
        buckets = self._of(account, now)
        wait = max((bucket.wait(now) for bucket in buckets), default=0.0)
        if not wait:
            for bucket in buckets:
                bucket.consume(now)
        return wait

    def charge(self, account: Account, amount: float, now: float) -> None:
        """Take an amount from each key's bucket; see :meth:`Bucket.charge`."""
        for bucket in self._of(account, now):
            bucket.charge(amount, now)

    def owed(self, account: Account, now: float) -> float:
        """Return the seconds until no key's bucket owes tokens."""
        buckets = map(self._buckets.get, account)
        return max((bucket.owed(now) for bucket in buckets if bucket is not None), default=0.0)

    def left(self, account: Account) -> list[float]:
        """Return the tokens in each key's bucket, as of its last use."""
        return [self._buckets[key].left for key in account]

    def restore(self, account: Account, kept: Mapping[str, tuple[float, float]]) -> None:
        """Set the tokens of an account's buckets, by key, and the times that they are from."""
        for level, key in enumerate(account):
            if key in kept:
                left, at = kept[key]
                self._bucket(key, level, at).left = left

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
    """Counts the connections or replies of each account, up to ``limit`` for each key."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def restore(self, held: Mapping[str, int]) -> None:
        """Set the number that each key holds."""
        self._held.update(held)

    def full(self, account: Account, spare: int = 0) -> bool:
        """Whether a key of the account is at its limit, or would be with ``spare`` more."""
        return any(
            self._held.get(key, 0) + spare >= self.limit * GROWTH**level
            for level, key in enumerate(account)
        )

    def acquire(self, account: Account) -> bool:
        """Count one more for the account. Return False and count none at its limit."""
        if self.full(account):
            return False
        for key in account:
            self._held[key] = self._held.get(key, 0) + 1
        return True

    def release(self, account: Account) -> None:
        """Count one less for the account."""
        for key in account:
            _lower(self._held, key, 1)


class Memory:
    """Counts the bytes that this process holds for its clients, by account.

    Call :meth:`acquire` before you store data that a client can make grow: buffers, queues,
    conversations, replies. Call :meth:`release` when you drop the data, with the same account and
    size. Store both beside the data: :func:`memory_size` of a text may change, and the account of a
    socket changes when its client authenticates. If :meth:`acquire` returns False, refuse the
    client with ``limit`` or close code 1013.

    Data that no client uses now belongs to the account :data:`CACHE`. A cache registers with
    :meth:`shed_by`: it has to drop data before data in use is refused. To move data into the cache,
    release the bytes and acquire them for :data:`CACHE`.

    One account may use :data:`SHARE` of the bytes that are free or cached. The more bytes are in
    use, the less each account gets. So no number of accounts can use everything.

    Args:
        limit: bytes for all accounts together.
        share: part of the free bytes that one account may hold.
    """

    def __init__(self, limit: int, share: float = SHARE) -> None:
        self.limit = limit
        self.used = 0  # acquired bytes, including cached ones
        self.cached = 0  # bytes of the account `CACHE`
        self._share = share
        self._held: dict[str, int] = {}
        self._caches: list[Callable[[int], None]] = []

    def __len__(self) -> int:
        return len(self._held)

    def used_by(self, account: Account) -> int:
        """Return the bytes that an account holds. Of networks the narrowest counts."""
        return self._held.get(account[0], 0)

    def shed_by(self, shed: Callable[[int], None]) -> None:
        """Register a cache.

        Args:
            shed: called with a number of bytes. It drops at least this number, the least recently
                used data first, or everything, and releases the bytes.
        """
        self._caches.append(shed)

    def acquire(self, account: Account, size: int) -> bool:
        """Count bytes. At a limit of the account or of the process, return False and count none."""
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

    def release(self, account: Account, size: int) -> None:
        """Stop counting bytes that :meth:`acquire` counted for the account."""
        if size <= 0:
            return
        self.used -= size
        if account == CACHE:
            self.cached -= size
        for key in account:
            _lower(self._held, key, size)


def account_of(principal: str) -> Account:
    """Return the account of a principal."""
    return (f"principal {principal}",)


def memory_size(data: str | bytes | bytearray) -> int:
    """Return the bytes of memory that a text or bytes take.

    If a ``str`` has a character beyond U+FFFF, each of its characters takes four bytes.
    """
    return sys.getsizeof(data)


def _lower(counts: dict[str, int], key: str, by: int) -> None:
    """Lower a count. At 0, forget the key."""
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
    """What each owner may spend in one day: tokens, or microdollars.

    At the start of a reply its highest cost is reserved; at its end the reservation is replaced by
    its cost. So several replies at once cannot spend the same rest of the day. Call :meth:`learn`
    with the amount that the owner spent before this process ran.

    Args:
        per_day: the limit; 0 for none, and then nothing is counted.
    """

    def __init__(self, per_day: int) -> None:
        self._per_day = per_day
        self._day = 0
        self._accounts: dict[str, _Spending] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def knows(self, owner: str, day: int) -> bool:
        """Whether the owner's spending of that day is known; else call :meth:`learn`."""
        self._turn(day)
        return not self._per_day or owner in self._accounts

    def learn(self, owner: str, day: int, spent: int) -> None:
        """Set the amount that an owner has spent on a day, unless it is known by now."""
        self._turn(day)
        if self._per_day:
            self._accounts.setdefault(owner, _Spending(spent))

    def left(self, owner: str) -> int | None:
        """Return the amount that an owner can still reserve; None without a limit.

        The owner must be known.
        """
        if not self._per_day:
            return None
        account = self._accounts[owner]
        return max(0, self._per_day - account.spent - account.reserved)

    def reserved(self, owner: str) -> int:
        """Return the amount that is reserved for an owner's replies."""
        return self._accounts[owner].reserved if owner in self._accounts else 0

    def reserve(self, owner: str, amount: int) -> None:
        """Reserve an amount for a reply that starts."""
        if self._per_day and owner in self._accounts:
            self._accounts[owner].reserved += amount

    def settle(self, owner: str, reserved: int, spent: int) -> None:
        """Replace the reservation for a reply by its cost."""
        account = self._accounts.get(owner)
        if account is not None:
            account.reserved -= reserved
            account.spent += spent

    def _turn(self, day: int) -> None:
        """Begin a new day. Only the reservations of the day before still count.

        If the clock steps back, the later day stays in use.
        """
        if day <= self._day:
            return
        self._day = day
        for owner, account in list(self._accounts.items()):
            account.spent = 0
            if not account.reserved:
                del self._accounts[owner]
