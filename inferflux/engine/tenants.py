"""TenantCounters: how much each tenant has been served, the virtual token counters of the policy `fair`.

A token of a prompt counts as one, a generated token as two (it is produced and then computed). A tenant that comes back
after a pause is lifted to the least served of those present, so nobody saves up turns by staying away. Knows no queue.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

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

    def served(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    @property
    def num_requests(self) -> Mapping[str, int]:
        """Of every tenant that has some here."""
        return self._num_requests

    def enter(self, tenant: str) -> None:
        """Notes one more request of this tenant's."""
        if tenant not in self._num_requests:
            self._served[tenant] = max(self.served(tenant), self._least_served(otherwise=self._floor))
        self._num_requests[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Notes that one of its requests has ended."""
        self._num_requests[tenant] -= 1
        if self._num_requests[tenant]:
            return
        del self._num_requests[tenant]
        self._floor = max(self._floor, self._least_served(otherwise=self._served[tenant]))
        if len(self._served) > MAX_REMEMBERED:
            self._forget()

    def charge(self, tenant: str, amount: int) -> None:
        self._served[tenant] += amount

    def _least_served(self, otherwise: int) -> int:
        """Of the tenants with requests here; `otherwise` when there are none."""
        return min(map(self._served.__getitem__, self._num_requests), default=otherwise)

    def _forget(self) -> None:
        """Drops whoever would be lifted anyway."""
        gone = [tenant for tenant, served in self._served.items() if served <= self._floor]
        for tenant in gone:
            if tenant not in self._num_requests:
                del self._served[tenant]
