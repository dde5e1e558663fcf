"""EngineStats: the engine's numbers at one moment, cheap enough to ride along with every batch of outputs.

Counters only grow while the engine lives; gauges are of now. `server/metrics` turns them into Prometheus series.
"""

from bisect import bisect_left
from typing import Final

import msgspec

TRANSFER_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)


class TierStats(msgspec.Struct):
    """One lower tier's numbers. Gauges: pages_total, pages_in_use (pages that can be found), state. Counters: the rest.

    state: on, full (what is there can be read, nothing more fits) or off. hit_tokens: prompt tokens that came from
    this tier. loads, recomputes: requests whose next page was here and was loaded, or computed as the faster way.
    transfers: moves by their seconds, one count per bucket of TRANSFER_BUCKETS and one for longer ones.
    """

    pages_total: int = 0
    pages_in_use: int = 0
    state: str = "on"
    hit_tokens: int = 0
    evictions: int = 0
    loads: int = 0
    recomputes: int = 0
    damaged_pages: int = 0
    foreign_pages: int = 0
    failed_moves: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    transfers: list[int] = msgspec.field(default_factory=lambda: [0] * (len(TRANSFER_BUCKETS) + 1))

    def note_move(self, seconds: float, num_bytes: int, ok: bool) -> None:
        """Counts a move that has ended."""
        self.transfer_s += seconds
        self.transfers[bisect_left(TRANSFER_BUCKETS, seconds)] += 1
        if ok:
            self.transfer_bytes += num_bytes
        else:
            self.failed_moves += 1


class EngineStats(msgspec.Struct):
    """Gauges: running, waiting (loading ones included), loading, batch_tokens (tokens of the last step),
    device_pages_*. Counters: the rest. prefix_hit_tokens: those of lower tiers included. tiers: the lower ones there
    are, `cpu` and `nvme`. expert_tokens: what each expert of a mixture got, all layers together. draft_tokens,
    accepted_draft_tokens: tokens computed on a guess, and those of them that were right."""

    running: int = 0
    waiting: int = 0
    loading: int = 0
    batch_tokens: int = 0
    device_pages_total: int = 0
    device_pages_in_use: int = 0
    device_pages_cached: int = 0
    steps: int = 0
    generation_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    tiers: dict[str, TierStats] = {}
    expert_tokens: list[int] = []
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    def at_rest(self) -> "EngineStats":
        """Returns them with nothing under way and nothing held: what is left of an engine that has ended."""
        return msgspec.structs.replace(
            self,
            running=0,
            waiting=0,
            loading=0,
            batch_tokens=0,
            device_pages_in_use=0,
            device_pages_cached=0,
            tiers={tier: msgspec.structs.replace(stats, pages_in_use=0) for tier, stats in self.tiers.items()},
        )
