"""The engines' numbers as Prometheus series, gathered when somebody looks.

An engine's counters start at zero again when its process is restarted; the series go on from where they were.
Knows no HTTP.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily

from inferflux.engine.stats import EngineStats
from inferflux.server.admission import Admission
from inferflux.server.backends import Backend, BackendManager, BackendState

# Series name (without prefix), the field of EngineStats, help.
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens computed."),
    ("generation_tokens", "generation_tokens", "Tokens generated."),
    ("prefix_cache_hit_tokens", "prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    ("prefix_cache_query_tokens", "prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    ("preemptions", "preemptions", "Times a running sequence gave its pages back."),
)
_GAUGES: tuple[tuple[str, str, Callable[[Backend], float]], ...] = (
    ("running_requests", "Sequences the engine computes now.", lambda backend: backend.client.stats.running),
    ("batch_tokens", "Tokens in the engine's last step.", lambda backend: backend.client.stats.batch_tokens),
    ("model_ready", "1 while the model takes requests.", lambda backend: backend.state is BackendState.READY),
)


@dataclass(slots=True)
class _Totals:
    """What one model's engines counted: those that are gone, and the one that runs, as of its last word."""

    num_restarts: int = 0
    gone: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def update(self, stats: EngineStats, num_restarts: int) -> None:
        now = {name: getattr(stats, name) for _, name, _ in _COUNTERS}
        if num_restarts != self.num_restarts or any(now[name] < value for name, value in self.last.items()):
            self.gone = {name: self.gone.get(name, 0) + value for name, value in self.last.items()}
            self.num_restarts = num_restarts
        self.last = now

    def of(self, name: str) -> int:
        return self.gone.get(name, 0) + self.last[name]


class EngineCollector:
    """A collector for a prometheus_client registry. `collect` runs on the event loop, which owns what it reads."""

    def __init__(self, manager: BackendManager, admission: Admission) -> None:
        self._manager = manager
        self._admission = admission
        self._totals = {backend.id: _Totals() for backend in manager.backends}

    def describe(self) -> Iterable[Metric]:
        return list(self.collect())

    def collect(self) -> Iterator[Metric]:
        backends = self._manager.backends
        for backend in backends:
            self._totals[backend.id].update(backend.client.stats, backend.client.num_restarts)
        yield from self._counters(backends)
        yield from _gauges(backends)
        yield from _page_gauges(backends)
        yield self._queue_depth(backends)

    def _counters(self, backends: Iterable[Backend]) -> Iterator[Metric]:
        for series, name, text in _COUNTERS:
            family = CounterMetricFamily(f"inferflux_{series}", text, labels=("model",))
            for backend in backends:
                family.add_metric((backend.id,), self._totals[backend.id].of(name))
            yield family
        restarts = CounterMetricFamily(
            "inferflux_engine_restarts", "Times a dead engine was replaced.", labels=("model",)
        )
        for backend in backends:
            restarts.add_metric((backend.id,), backend.client.num_restarts)
        yield restarts

    def _queue_depth(self, backends: Iterable[Backend]) -> Metric:
        family = GaugeMetricFamily(
            "inferflux_queue_depth", "Requests and sequences waiting to start, in server and engine.", labels=("model",)
        )
        for backend in backends:
            family.add_metric((backend.id,), self._admission.waiting[backend.id] + backend.client.stats.waiting)
        return family


def _gauges(backends: Iterable[Backend]) -> Iterator[Metric]:
    for series, text, value in _GAUGES:
        family = GaugeMetricFamily(f"inferflux_{series}", text, labels=("model",))
        for backend in backends:
            family.add_metric((backend.id,), value(backend))
        yield family


def _page_gauges(backends: Iterable[Backend]) -> Iterator[Metric]:
    """The total is a gauge whose name ends like a counter's: left untyped, which is what linters accept."""
    in_use = GaugeMetricFamily("inferflux_kv_pages_in_use", "KV pages held by sequences.", labels=("model", "tier"))
    total = UnknownMetricFamily("inferflux_kv_pages_total", "KV pages the tier has room for.", labels=("model", "tier"))
    for backend in backends:
        stats = backend.client.stats
        in_use.add_metric((backend.id, "device"), stats.device_pages_in_use)
        total.add_metric((backend.id, "device"), stats.device_pages_total)
    yield in_use
    yield total
