"""The engines' numbers as Prometheus series, collected at each scrape.

A model's series add up its engines: while it is being replaced there are two, and what earlier ones have counted stays
in its counters, even after it has been unloaded. Knows no HTTP.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from inferflux.server.admission import Admission
from inferflux.server.backends import Backend, BackendManager
from inferflux.server.tier_metrics import tier_metrics

Engines = Mapping[str, Sequence[Backend]]

# Series name (without prefix), the count's name, help.
_COUNTERS = (
    ("generation_tokens", "generation_tokens", "Tokens generated."),
    ("prefix_cache_query_tokens", "prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    ("draft_tokens", "draft_tokens", "Draft tokens computed by speculative decoding."),
    ("accepted_draft_tokens", "accepted_draft_tokens", "Draft tokens that were accepted."),
    ("preemptions", "preemptions", "Preemptions of running sequences."),
    ("engine_restarts", "restarts", "Restarts of an engine that had died."),
    ("engine_retries", "retries", "Requests passed to a new engine after theirs had died."),
)
_GAUGES: tuple[tuple[str, str, Callable[[Backend], float]], ...] = (
    ("running_requests", "Sequences being computed.", lambda backend: backend.client.stats.running),
    ("batch_tokens", "Tokens in the engine's last step.", lambda backend: backend.client.stats.batch_tokens),
    ("model_ready", "1 while the model accepts requests.", lambda backend: backend.serves),
)


class EngineCollector:
    """A collector for a prometheus_client registry. `collect` runs on the event loop, which owns what it reads."""

    def __init__(self, manager: BackendManager, admission: Admission) -> None:
        self._manager = manager
        self._admission = admission

    def describe(self) -> Iterable[Metric]:
        return list(self.collect())

    def collect(self) -> Iterator[Metric]:
        engines: dict[str, list[Backend]] = {}
        for backend in self._manager.engines:
            engines.setdefault(backend.id, []).append(backend)
        counts = {model_id: self._manager.counts(model_id).counts() for model_id in self._manager.counted}
        yield from _counters(counts)
        yield from _gauges(engines)
        yield from tier_metrics(engines, counts)
        yield _expert_tokens(engines)
        yield self._queue_depth(engines)

    def _queue_depth(self, engines: Engines) -> Metric:
        family = GaugeMetricFamily(
            "inferflux_queue_depth", "Requests and sequences waiting to start, in server and engine.", labels=("model",)
        )
        for model_id, backends in engines.items():
            waiting = sum(backend.client.stats.waiting for backend in backends)
            family.add_metric((model_id,), self._admission.waiting[model_id] + waiting)
        return family


def _counters(counts: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    for series, name, text in _COUNTERS:
        family = CounterMetricFamily(f"inferflux_{series}", text, labels=("model",))
        for model_id, of_model in counts.items():
            family.add_metric((model_id,), of_model[name])
        yield family


def _gauges(engines: Engines) -> Iterator[Metric]:
    for series, text, value in _GAUGES:
        family = GaugeMetricFamily(f"inferflux_{series}", text, labels=("model",))
        for model_id, backends in engines.items():
            family.add_metric((model_id,), sum(map(value, backends)))
        yield family


def _expert_tokens(engines: Engines) -> Metric:
    """Counted by the engines that run now: a restart begins at zero, as with any counter of a process."""
    family = CounterMetricFamily(
        "inferflux_expert_tokens",
        "Tokens routed to each expert of an MoE model, over all layers.",
        labels=("model", "expert"),
    )
    for model_id, backends in engines.items():
        for expert, counts in enumerate(zip(*(one.client.stats.expert_tokens for one in backends), strict=False)):
            family.add_metric((model_id, str(expert)), sum(counts))
    return family
