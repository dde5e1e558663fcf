"""The KV tiers' numbers as Prometheus series: `device`, `cpu` and `nvme`, whether or not a model has them.

Knows the engines' stats and what they have counted so far; no HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    UnknownMetricFamily,
)

from inferflux.engine.stats import TRANSFER_BUCKETS, EngineStats
from inferflux.server.backends import Backend
from inferflux.server.backends.totals import TIERS

Counts = Mapping[str, float]

DEVICE: Final = "device"
STATES: Final = ("on", "full", "off")

# Series name (without prefix), help, labels besides model, and each of their values with the count's name.
_COUNTERS: Final[tuple[tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], str]], ...]] = (
    (
        "prefix_cache_hit_tokens",
        "Prompt tokens found in the prefix cache, by the tier they came from.",
        ("tier",),
        {
            (DEVICE,): "device.hit_tokens",
            ("cpu",): "cpu.hit_tokens",
            ("nvme",): "nvme.hit_tokens",
        },
    ),
    (
        "kv_evictions",
        "Cached KV pages that left a tier to make room.",
        ("tier",),
        {
            (DEVICE,): "evictions",
            ("cpu",): "cpu.evictions",
            ("nvme",): "nvme.evictions",
        },
    ),
    (
        "kv_transfer_bytes",
        "Bytes of KV pages moved from or to a tier.",
        ("tier",),
        {
            ("cpu",): "cpu.transfer_bytes",
            ("nvme",): "nvme.transfer_bytes",
        },
    ),
    (
        "kv_transfer_failures",
        "Moves of KV pages that came to nothing.",
        ("tier",),
        {
            ("cpu",): "cpu.failed_moves",
            ("nvme",): "nvme.failed_moves",
        },
    ),
    (
        "kv_bad_pages",
        "KV pages in the file that could not be used: damaged, or another model's.",
        ("reason",),
        {
            ("damaged",): "nvme.damaged_pages",
            ("foreign",): "nvme.foreign_pages",
        },
    ),
    (
        "kv_load_decisions",
        "Prefixes in a lower tier that were loaded, or computed again because that was faster.",
        ("tier", "reason"),
        {
            ("cpu", "load"): "cpu.loads",
            ("cpu", "recompute"): "cpu.recomputes",
            ("nvme", "load"): "nvme.loads",
            ("nvme", "recompute"): "nvme.recomputes",
        },
    ),
)


def tier_metrics(engines: Mapping[str, Sequence[Backend]], counts: Mapping[str, Counts]) -> Iterator[Metric]:
    """Yields every series of the tiers. counts: by model, of all its engines so far."""
    stats = {model_id: [backend.client.stats for backend in backends] for model_id, backends in engines.items()}
    yield from _page_gauges(stats)
    yield _states(stats)
    for series, text, labels, values in _COUNTERS:
        family = CounterMetricFamily(f"inferflux_{series}", text, labels=("model", *labels))
        for model_id, of_model in counts.items():
            for words, name in values.items():
                family.add_metric((model_id, *words), _count(of_model, name))
        yield family
    yield _transfers(counts)


def _count(counts: Counts, name: str) -> float:
    if name == "device.hit_tokens":
        return counts["prefix_hit_tokens"] - sum(counts[f"{tier}.hit_tokens"] for tier in TIERS)
    return counts[name]


def _page_gauges(stats: Mapping[str, Sequence[EngineStats]]) -> Iterator[Metric]:
    """The total is a gauge whose name ends like a counter's: left untyped, which is what linters accept."""
    labels = ("model", "tier")
    in_use = GaugeMetricFamily(
        "inferflux_kv_pages_in_use", "KV pages held by sequences (device) or kept (lower tiers).", labels=labels
    )
    total = UnknownMetricFamily("inferflux_kv_pages_total", "KV pages the tier has room for.", labels=labels)
    for model_id, engines in stats.items():
        in_use.add_metric((model_id, DEVICE), sum(one.device_pages_in_use for one in engines))
        total.add_metric((model_id, DEVICE), sum(one.device_pages_total for one in engines))
        for tier in TIERS:
            there = [one.tiers[tier] for one in engines if tier in one.tiers]
            in_use.add_metric((model_id, tier), sum(one.pages_in_use for one in there))
            total.add_metric((model_id, tier), sum(one.pages_total for one in there))
    yield in_use
    yield total


def _states(stats: Mapping[str, Sequence[EngineStats]]) -> Metric:
    family = GaugeMetricFamily(
        "inferflux_kv_tier_state",
        "1 for the state the tier is in: on, full (nothing more fits) or off; a tier that is not set up has none.",
        labels=("model", "tier", "status"),
    )
    for model_id, engines in stats.items():
        for tier in TIERS:
            there = [one.tiers[tier].state for one in engines if tier in one.tiers]
            for state in STATES if there else ():
                family.add_metric((model_id, tier, state), float(there[-1] == state))
    return family


def _transfers(counts: Mapping[str, Counts]) -> Metric:
    family = HistogramMetricFamily(
        "inferflux_kv_transfer_seconds", "Time of one move of a KV page from or to a tier.", labels=("model", "tier")
    )
    bounds = (*map(str, TRANSFER_BUCKETS), "+Inf")
    for model_id, of_model in counts.items():
        for tier in TIERS:
            sums = accumulate(of_model[f"{tier}.transfers.{index}"] for index in range(len(bounds)))
            family.add_metric((model_id, tier), list(zip(bounds, sums, strict=True)), of_model[f"{tier}.transfer_s"])
    return family
