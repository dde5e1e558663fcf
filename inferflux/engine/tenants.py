"""TenantCounters: how much each tenant has been served, the virtual token counters of the policy `fair`.

A token of a prompt counts as one, a generated token as two (it is produced and then computed). A tenant that comes back
after a pause is lifted to the least served of those present, so nobody saves up turns by staying away. Knows no queue.
No call costs more for many tenants, but for one in thousands that forgets some.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from inferflux.engine.lazy_heap import LazyHeap

PROMPT_TOKEN: Final = 1
OUTPUT_TOKEN: Final = 2
# More tenants than this are remembered only while they have requests here, or have been served more than others.
MAX_REMEMBERED: Final = 4096


class TenantCounters:
    """Mutated by the scheduler's thread only."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._num_requests: Counter[str] = Counter()
        self._floor = 0
        self._most_remembered = MAX_REMEMBERED
        # Those with one request here, and those with several, by what they have been served.
        self._singles = LazyHeap(self._served.__getitem__)
        self._others = LazyHeap(self._served.__getitem__)

    def served(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    @property
    def num_requests(self) -> Mapping[str, int]:
        """Of every tenant that has some here."""
        return self._num_requests

    @property
    def least_served_of_others(self) -> int | None:
        """Of the tenants with more than one request here; None when there are none."""
        first = self._others.first()
        return None if first is None else self._served[first]

    def singles(self, limit: int, most: int) -> list[str]:
        """Returns tenants with one request here that have been served no more than `limit`; at most so many."""
        return self._singles.up_to(limit, most)

    def enter(self, tenant: str) -> None:
        """Notes one more request of this tenant's."""
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
        """Notes that one of its requests has ended."""
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
        """Of the tenants with requests here; `otherwise` when there are none."""
        firsts = (self._singles.first(), self._others.first())
        return min((self._served[first] for first in firsts if first is not None), default=otherwise)

    def _forget(self) -> None:
        """Drops whoever would be lifted anyway."""
        gone = [tenant for tenant, served in self._served.items() if served <= self._floor]
        for tenant in gone:
            if tenant not in self._num_requests:
                del self._served[tenant]
        # Not again at once, when few could be dropped.
        self._most_remembered = max(MAX_REMEMBERED, 2 * len(self._served))
