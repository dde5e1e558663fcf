"""Failed attempts: slows down the guessing of keys, by the address that it comes from.

An address that has used up its failures is refused even with the right credential; else a lucky guess would succeed.
Many may share an address (a proxy, an office), and one of them must not lock out the others: so callers who have been
authenticated from that address before are let through, and so are those whose credential cannot be guessed (the caller
knows which). Addresses are those of connections; headers that name others are not believed. Lives on one event loop;
knows no HTTP.
"""

import hashlib
import ipaddress
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from inferflux.errors import InferFluxError
from inferflux.server.access.bucket import BucketTable
from inferflux.server.access.rate_limit import retry_after_s

FAILURES_PER_MINUTE: Final = 20
MAX_SOURCES: Final = 16_384
MAX_PROVEN: Final = 65_536
_IPV6_SITE_BITS = 64


class TooManyAttemptsError(InferFluxError):
    """Too many credentials from one address were wrong. retry_after_s: whole seconds, 1 to 120."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many failed attempts from this address; try again later")
        self.retry_after_s = retry_after


class FailedAttempts:
    """For each request with a credential: `check` first, then `failed` or `succeeded`.

    clock: seconds, never going back. Both tables are bounded; the entries unused for longest go.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        failures_per_minute: int = FAILURES_PER_MINUTE,
        max_sources: int = MAX_SOURCES,
    ) -> None:
        self._clock = clock
        self._limit = failures_per_minute
        self._failures: BucketTable[str] = BucketTable(max_sources)
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._tag_key = os.urandom(32)

    def check(self, address: str, token: str) -> None:
        """Raises TooManyAttemptsError when the address has no attempt left and this token never worked from it."""
        if not self._failures:
            return
        bucket = self._failures.find(source_of(address), self._limit, self._clock())
        if bucket is not None and (wait_s := bucket.wait_s(1)) > 0 and self._tag(address, token) not in self._proven:
            raise TooManyAttemptsError(retry_after_s(wait_s))

    def failed(self, address: str, token: str) -> None:
        """Counts a failure. A token that stopped working (revoked, expired) is no longer proof either."""
        self._proven.pop(self._tag(address, token), None)
        now = self._clock()
        bucket = self._failures.get(source_of(address), self._limit, now)
        if bucket.hold(1):
            bucket.spend(1, now)

    def succeeded(self, address: str, token: str) -> None:
        tag = self._tag(address, token)
        self._proven[tag] = None
        self._proven.move_to_end(tag)
        if len(self._proven) > MAX_PROVEN:
            self._proven.popitem(last=False)

    def _tag(self, address: str, token: str) -> bytes:
        """Stands for the pair; says nothing about the token to whoever reads this process's memory."""
        text = f"{address}\0{token}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, key=self._tag_key, digest_size=16).digest()


def source_of(address: str) -> str:
    """Returns whom to count an address for: an IPv4 address itself, an IPv6 one's /64 (one customer has that many)."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(parsed) >> _IPV6_SITE_BITS << _IPV6_SITE_BITS)) + f"/{_IPV6_SITE_BITS}"
