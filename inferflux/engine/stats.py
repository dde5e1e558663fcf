"""EngineStats: the engine's numbers at one moment, cheap enough to ride along with every batch of outputs.

Counters only grow while the engine lives; gauges are of now. `server/metrics` turns them into Prometheus series.
"""

import msgspec


class EngineStats(msgspec.Struct):
    """Gauges: running, waiting, batch_tokens (tokens of the last step), device_pages_*. Counters: the rest."""

    running: int = 0
    waiting: int = 0
    batch_tokens: int = 0
    device_pages_total: int = 0
    device_pages_in_use: int = 0
    device_pages_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
