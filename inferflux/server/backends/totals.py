"""EngineTotals: what a model's engines have counted so far, over restarts, unloading and swaps.

An engine's counters start at zero with each process; these go on. Knows numbers only.
"""

from collections.abc import Hashable, Mapping
from typing import Final

from inferflux.engine.stats import EngineStats

COUNTED: Final = ("prompt_tokens", "generation_tokens", "prefix_hit_tokens", "prefix_query_tokens", "preemptions")
"""The fields of EngineStats that only grow while an engine lives."""


class EngineTotals:
    """The counts of engines that are gone, and of the one that runs, as of its last word."""

    def __init__(self) -> None:
        self._gone = dict.fromkeys(COUNTED, 0)
        self._last = dict.fromkeys(COUNTED, 0)
        self._era: Hashable = None

    def update(self, stats: EngineStats, era: Hashable) -> None:
        """Notes the numbers of the engine that runs. era: another one for each engine process."""
        now = {name: int(getattr(stats, name)) for name in COUNTED}
        if era != self._era or any(now[name] < value for name, value in self._last.items()):
            self.add(self._last)
            self._era = era
        self._last = now

    def add(self, counts: Mapping[str, int]) -> None:
        """Adds what engines of before have counted."""
        self._gone = {name: value + counts[name] for name, value in self._gone.items()}

    def counts(self) -> Mapping[str, int]:
        return {name: value + self._last[name] for name, value in self._gone.items()}
