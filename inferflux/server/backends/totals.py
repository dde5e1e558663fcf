"""EngineTotals: what a model's engines have counted so far, over restarts, unloading and swaps.

An engine's counters start at zero with each process; these go on. Knows numbers only. A lower tier's counters have
names such as `cpu.hit_tokens`, and `cpu.transfers.3` for the bucket of that number.
"""

from collections.abc import Hashable, Mapping
from typing import Final

from inferflux.engine.stats import EngineStats, TierStats

COUNTED: Final = (
    "generation_tokens",
    "prefix_hit_tokens",
    "prefix_query_tokens",
    "draft_tokens",
    "accepted_draft_tokens",
    "preemptions",
    "evictions",
)
"""The fields of EngineStats that only grow while an engine lives, besides those of the tiers."""
LOSSES: Final = ("restarts", "retries")
"""What is counted of engines from without, and only ever added."""
TIERS: Final = ("cpu", "nvme")
TIER_COUNTED: Final = (
    "hit_tokens",
    "evictions",
    "loads",
    "recomputes",
    "damaged_pages",
    "foreign_pages",
    "failed_moves",
    "transfer_bytes",
    "transfer_s",
)


class EngineTotals:
    """The counts of engines that are gone, and of the one that runs, as of its last word."""

    def __init__(self) -> None:
        self._gone: dict[str, float] = _flat(EngineStats())
        self._last = self._gone
        self._era: Hashable = None

    def update(self, stats: EngineStats, era: Hashable) -> None:
        """Notes the numbers of the engine that runs. era: another one for each engine process."""
        now = _flat(stats)
        if era != self._era or any(now[name] < value for name, value in self._last.items()):
            self.add(self._last)
            self._era = era
        self._last = now

    def add(self, counts: Mapping[str, float]) -> None:
        """Adds what engines of before have counted."""
        self._gone = {name: value + counts[name] for name, value in self._gone.items()}

    def counts(self) -> Mapping[str, float]:
        return {name: value + self._last[name] for name, value in self._gone.items()}


def _flat(stats: EngineStats) -> dict[str, float]:
    """Returns all that only grows, by name; tiers that are not there have counted nothing."""
    counts: dict[str, float] = {name: getattr(stats, name) for name in COUNTED} | dict.fromkeys(LOSSES, 0)
    for tier in TIERS:
        tier_stats = stats.tiers.get(tier) or TierStats()
        counts |= {f"{tier}.{name}": getattr(tier_stats, name) for name in TIER_COUNTED}
        counts |= {f"{tier}.transfers.{index}": count for index, count in enumerate(tier_stats.transfers)}
    return counts
