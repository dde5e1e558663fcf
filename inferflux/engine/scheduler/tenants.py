"""TenantCounters: how much each tenant has been served, the virtual token counters of the policy `fair`.

A prompt token counts one, a generated token two (it is sampled and then computed). A tenant that comes back after a
pause is lifted to the least served of those present, so nobody saves up turns by staying away. The cost of a call does
not depend on the number of tenants, but for one in thousands that forgets some. Knows no queue.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from inferflux.engine.scheduler.lazy_heap import LazyHeap

PROMPT_TOKEN: Final = 1
OUTPUT_TOKEN: Final = 2
# Beyond this number a tenant is remembered only while it has requests here, or has been served more than others.
MAX_REMEMBERED: Final = 4096


class TenantCounters:
    """Mutated by the scheduler's thread only."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._num_requests: Counter[str] = Counter()
        self._floor = 0
        self._most_remembered = MAX_REMEMBERED
        # Tenants with one request here, and those with several, by what they have been served.
        self._singles = LazyHeap(self._served.__getitem__)
        self._others = LazyHeap(self._served.__getitem__)

    def served(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    @property
    def num_requests(self) -> Mapping[str, int]:
        """Requests by tenant, of every tenant that has some here."""
        return self._num_requests

    @property
    def least_served_of_others(self) -> int | None:
        """What the least served tenant with more than one request here has been served; None when there is no such
        tenant."""
        first = self._others.first()
        return None if first is None else self._served[first]

    def singles(self, limit: int, most: int) -> list[str]:
        """Returns up to `most` tenants with one request here that have been served at most `limit`."""
        return self._singles.up_to(limit, most)

    def enter(self, tenant: str) -> None:
        """Counts one more request of the tenant."""
        num = self._num_requests[tenant] + 1
        if num == 1:
            self._served[tenant] = max(self.served(tenant), self._least_served(otherwise=self._floor))
        self._num_requests[tenant] = num
        if num == 1:
            self._singles.put(tenant)
        elif num == 2:
            self._singles.remove(tenant)
            self._others.put(tenant)

    def leave(self, tenant: str) -> None:
        """Counts one request of the tenant less."""
        num = self._num_requests[tenant] - 1
        self._num_requests[tenant] = num
        if num == 1:
            self._others.remove(tenant)
            self._singles.put(tenant)
        if num:
            return
        self._singles.remove(tenant)
        del self._num_requests[tenant]
        self._floor = max(self._floor, self._least_served(otherwise=self._served[tenant]))
        if len(self._served) > self._most_remembered:
            self._forget()

    def charge(self, tenant: str, amount: int) -> None:
        self._served[tenant] += amount

    def _least_served(self, otherwise: int) -> int:
        """What the least served tenant with requests here has been served; `otherwise` when there is none."""
        firsts = (self._singles.first(), self._others.first())
        return min((self._served[first] for first in firsts if first is not None), default=otherwise)

    def _forget(self) -> None:
        """Drops tenants that would be lifted to the floor anyway."""
        gone = [tenant for tenant, served in self._served.items() if served <= self._floor]
        for tenant in gone:
            if tenant not in self._num_requests:
                del self._served[tenant]
        # Not again at once, when few could be dropped.
        self._most_remembered = max(MAX_REMEMBERED, 2 * len(self._served))
