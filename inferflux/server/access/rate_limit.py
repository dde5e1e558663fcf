"""Rate limits: how many requests and how many tokens a minute one principal may have.

Requests are counted when they come. Tokens are reserved (prompt and max_tokens) before a request runs, spent as they
are used, and the rest is given back when it ends. Lives on one event loop; knows no HTTP, and neither sets nor stores
limits: each call says which apply, so a change holds from the next request on, and refills nothing.
"""

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, NamedTuple

from inferflux.errors import InferFluxError
from inferflux.server.access.bucket import Allowance, Bucket, BucketTable

MAX_RETRY_AFTER_S: Final = 120
MAX_PRINCIPALS: Final = 65_536

LimitKind = Literal["requests", "tokens"]


class Limits(NamedTuple):
    """One principal's limits; 0: none."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class RateLimitedError(InferFluxError):
    """A limit is reached. retry_after_s: whole seconds, 1 to 120."""

    def __init__(self, message: str, kind: LimitKind, allowance: Allowance, wait_s: float) -> None:
        super().__init__(message)
        self.kind = kind
        self.allowance = allowance
        self.retry_after_s = retry_after_s(wait_s)


class Reservation:
    """Tokens set aside for one request. Leaving the `with` block gives back what was not spent.

    A reservation without a bucket (no limit) takes everything and counts nothing.
    """

    __slots__ = ("_bucket", "_clock", "_held", "allowance")

    def __init__(self, bucket: Bucket | None, num_tokens: int, clock: Callable[[], float]) -> None:
        """bucket: what holds the tokens already; None without a limit. allowance: what is left besides them."""
        self._bucket = bucket
        self._held = num_tokens
        self._clock = clock
        self.allowance = bucket.allowance() if bucket is not None else None

    def spend(self, num_tokens: int) -> None:
        """Counts tokens as used; never more than were reserved."""
        if self._bucket is None:
            return
        num_tokens = min(num_tokens, self._held)
        self._held -= num_tokens
        self._bucket.spend(num_tokens, self._clock())

    def close(self) -> None:
        """Gives the rest back. May be called again."""
        if self._bucket is not None:
            self._bucket.release(self._held)
        self._held = 0

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RateLimiter:
    """All principals' buckets, of at most `max_principals` for each kind of limit. clock: seconds, never going back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_principals: int = MAX_PRINCIPALS) -> None:
        self._clock = clock
        self._requests: BucketTable[str] = BucketTable(max_principals)
        self._tokens: BucketTable[str] = BucketTable(max_principals)

    def take_request(self, principal_id: str, limits: Limits) -> Allowance | None:
        """Counts one request. Returns what is left, None without a limit. Raises RateLimitedError."""
        limit = limits.requests_per_minute
        if not limit:
            return None
        now = self._clock()
        bucket = self._requests.get(principal_id, limit, now)
        if not bucket.hold(1):
            message = f"rate limit reached: {limit} requests a minute"
            raise RateLimitedError(message, "requests", bucket.allowance(), bucket.wait_s(1))
        bucket.spend(1, now)
        return bucket.allowance()

    def reserve_tokens(self, principal_id: str, limits: Limits, num_tokens: int) -> Reservation:
        """Sets aside the most tokens a request can use: its prompt's and its max_tokens. Raises RateLimitedError."""
        limit = limits.tokens_per_minute
        if not limit:
            return Reservation(None, num_tokens, self._clock)
        bucket = self._tokens.get(principal_id, limit, self._clock())
        if not bucket.hold(num_tokens):
            message = f"rate limit reached: {limit} tokens a minute, and this request needs up to {num_tokens}"
            if num_tokens > limit:
                message += "; it needs a shorter prompt or a smaller max_tokens"
            raise RateLimitedError(message, "tokens", bucket.allowance(), bucket.wait_s(num_tokens))
        return Reservation(bucket, num_tokens, self._clock)


def retry_after_s(wait_s: float) -> int:
    """Returns whole seconds from 1 to 120 for a Retry-After header."""
    return max(1, math.ceil(min(wait_s, MAX_RETRY_AFTER_S)))
