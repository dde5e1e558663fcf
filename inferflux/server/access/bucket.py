"""Bucket: a token bucket whose contents can be held before they are spent, and a bounded table of buckets.

The usual token bucket (a level that rises at `capacity` a minute up to `capacity`), with one addition: what a running
request may still need is *held*, and only what it has used is *spent*. What is held and then released was never gone,
so giving back cannot lift the level above what it would have been. Over any window, at most capacity + rate * time is
spent. Time is an argument; knows nothing of principals or HTTP.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, NamedTuple, TypeVar

WINDOW_S: Final = 60.0
_ROUNDING: Final = 1e-6
"""Tolerance for rounding: a caller who waited exactly as long as it was told to must find its unit there. What is taken
too early is missing later, so the bound holds up to this much."""

KeyT = TypeVar("KeyT", bound=Hashable)


class Allowance(NamedTuple):
    """What is left of a limit: limit per minute, whole units remaining, seconds until all of it is back."""

    limit: int
    remaining: int
    reset_s: float


class Bucket:
    """One bucket, full at first. The time given to its methods should not go back; if it does, nothing refills."""

    __slots__ = ("_at", "_capacity", "_held", "_level")

    def __init__(self, capacity: int, now: float) -> None:
        self._capacity = capacity
        self._level = float(capacity)
        self._held = 0
        self._at = now

    def advance(self, capacity: int, now: float) -> None:
        """Lets time pass, then changes the capacity: what the bucket holds stays, or shrinks to the new capacity."""
        elapsed = now - self._at
        if elapsed > 0:
            self._at = now
            self._level = min(self._capacity, self._level + elapsed * self._capacity / WINDOW_S)
        if capacity != self._capacity:
            self._capacity = capacity
            self._level = min(self._level, capacity)

    def hold(self, amount: int) -> bool:
        """Sets `amount` aside; False, and nothing is, when there is less."""
        if self._level - self._held < amount - _ROUNDING:
            return False
        self._held += amount
        return True

    def spend(self, amount: int, now: float) -> None:
        """Uses up what was held before. (Time passes first: a full bucket gains nothing from what is spent later.)"""
        self.advance(self._capacity, now)
        self._held -= amount
        self._level -= amount

    def release(self, amount: int) -> None:
        """Gives back what was held and not used."""
        self._held -= amount

    def wait_s(self, amount: int) -> float:
        """Seconds until `amount` can be held if nobody releases or holds anything."""
        missing = amount - _ROUNDING - (self._level - self._held)
        return max(0.0, missing) * WINDOW_S / self._capacity

    def allowance(self) -> Allowance:
        free = self._level - self._held
        return Allowance(self._capacity, max(0, int(free)), (self._capacity - free) * WINDOW_S / self._capacity)


class BucketTable(Generic[KeyT]):
    """Buckets by key, at most `max_buckets`: the one unused for longest goes.

    A bucket unused for a minute is full, and forgetting a full one forgives nothing; so limits hold as long as fewer
    than `max_buckets` keys are in use within one minute.
    """

    def __init__(self, max_buckets: int) -> None:
        self._max_buckets = max_buckets
        self._buckets: OrderedDict[KeyT, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def get(self, key: KeyT, capacity: int, now: float) -> Bucket:
        """Returns the key's bucket as it is now, a full one for a key not seen lately."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(capacity, now)
            if len(self._buckets) > self._max_buckets:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
            bucket.advance(capacity, now)
        return bucket

    def find(self, key: KeyT, capacity: int, now: float) -> Bucket | None:
        """Returns the key's bucket as it is now, None for a key not seen lately. Does not count as use."""
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.advance(capacity, now)
        return bucket
