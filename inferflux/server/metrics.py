"""Metrics: every series the server itself counts, in a registry of its own.

The engines' series are `engine_metrics`' work; both end up on one page. Labels are bounded: ids of served models,
route templates, statuses, a few words; never a user's text or key. Knows no HTTP beyond an Accept header.
"""

import platform
from typing import get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from inferflux import __version__
from inferflux.server.access.principal import FailureReason

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)

# Each begins at zero: Prometheus sees no growth in a series whose first sample is its first event.
MODEL_EVENTS = ("loaded", "failed", "switched", "draining", "unloaded", "idle_unloaded", "withdrawn", "default")
REGISTRY_EVENTS = ("registry_applied", "registry_refused")

# Models come and go at run time; the series of so many are kept apart, the others share one label.
MAX_MODEL_LABELS = 1000
OTHER = "other"


class ModelMetrics:
    """One model's series with their label bound, for the path that every token takes."""

    __slots__ = ("inter_token_latency", "prompt_tokens", "queue_wait", "stream_tokens", "time_to_first_token")

    def __init__(self, metrics: "Metrics", model_id: str) -> None:
        self.time_to_first_token = metrics.time_to_first_token.labels(model_id)
        self.inter_token_latency = metrics.inter_token_latency.labels(model_id)
        self.queue_wait = metrics.queue_wait.labels(model_id)
        self.prompt_tokens = metrics.prompt_tokens.labels(model_id)
        self.stream_tokens = metrics.stream_tokens.labels(model_id)


class Metrics:
    """The server's own series."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        self._add_request_series()
        self._add_generation_series()
        self._add_access_series()
        self._add_model_series()
        self._by_model: dict[str, ModelMetrics] = {}
        self._build_info()

    def add_model(self, model_id: str) -> str:
        """Gives a model its series, at zero, and returns its label: its id, unless there have been too many."""
        if model_id in self._by_model:
            return model_id
        if len(self._by_model) >= MAX_MODEL_LABELS:
            return OTHER
        self._by_model[model_id] = ModelMetrics(self, model_id)
        for event in MODEL_EVENTS:
            self.model_events.labels(model_id, event)
        return model_id

    def for_model(self, model_id: str) -> ModelMetrics:
        """Returns the series of a model that is or was served."""
        return self._by_model.get(model_id) or ModelMetrics(self, OTHER)

    def model_label(self, model_id: str | None) -> str:
        """Returns the label for a model a caller named: its id if it is or was served, else "other"; "" for none."""
        if model_id is None:
            return ""
        return model_id if model_id in self._by_model else OTHER

    def model_event(self, model_id: str, event: str, load_s: float | None = None) -> None:
        """Counts what happened to a model, or with an empty id to the registry. load_s: how long its load took."""
        label = self.add_model(model_id) if model_id else ""
        self.model_events.labels(label, event).inc()
        if load_s is not None:
            self.model_load.labels(label).set(load_s)

    def guardrail_blocked(self, reason: str) -> None:
        self.guardrail_blocks.labels(reason).inc()

    def count_audit(self, num_written: int, num_dropped: int) -> None:
        """May be called by any thread."""
        self.audit_records.inc(num_written)
        self.audit_dropped.inc(num_dropped)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Returns the page and its content type: OpenMetrics where the Accept header asks for it, else text."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is none
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"inferflux_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"inferflux_{name}", documentation, labels, registry=self.registry, buckets=buckets)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"inferflux_{name}", documentation, labels, registry=self.registry)

    def _add_request_series(self) -> None:
        self.requests = self._counter(
            "requests_total",
            "HTTP requests answered; status 499: the client disconnected first.",
            "endpoint",
            "model",
            "status",
        )
        self.request_duration = self._histogram(
            "request_duration_seconds", "Time from a request's headers to its last byte.", LATENCY_BUCKETS, "endpoint"
        )

    def _add_generation_series(self) -> None:
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from a request's headers to its first token.", LATENCY_BUCKETS, "model"
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between consecutive tokens of a sequence.", TOKEN_BUCKETS, "model"
        )
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "Time a sequence waits, in the server and in the engine.", LATENCY_BUCKETS, "model"
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens_total",
            "Prompt tokens, counted once per prompt whatever its choices, including those found in the prefix cache.",
            "model",
        )
        self.stream_tokens = self._counter("stream_tokens_total", "Tokens sent in streamed answers.", "model")

    def _add_access_series(self) -> None:
        self.auth_failures = self._counter("auth_failures_total", "Requests without valid credentials.", "reason")
        self.rate_limited = self._counter("rate_limited_total", "Requests answered with status 429.", "reason")
        self.guardrail_blocks = self._counter("guardrail_blocks_total", "Requests refused by a guardrail.", "reason")
        self.opa_failures = self._counter("opa_failures_total", "Requests without the policy service's decision.")
        self.audit_records = self._counter("audit_records_total", "Records written to the audit log.")
        for failure in get_args(FailureReason):
            self.auth_failures.labels(failure)
        for limit in ("requests", "tokens", "attempts", "queue_full"):
            self.rate_limited.labels(limit)
        self.audit_dropped = self._counter("audit_records_dropped_total", "Records missing from the audit log.")
        for reason in ("blocklist", "opa", "opa_error", "output_blocklist"):
            self.guardrail_blocks.labels(reason)

    def _add_model_series(self) -> None:
        self.model_events = self._counter("model_events_total", "Model lifecycle events.", "model", "event")
        for event in REGISTRY_EVENTS:
            self.model_events.labels("", event)
        self.model_load = self._gauge("model_load_seconds", "Duration of the model's last load.", "model")

    def _build_info(self) -> None:
        info = self._gauge("build_info", "Always 1; the labels name the build.", "version", "python")
        info.labels(__version__, platform.python_version()).set(1)
