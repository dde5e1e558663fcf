"""Tracing: each request as a span, and in it what its sequences waited for and computed.

Spans go to an OpenTelemetry collector by OTLP over HTTP; the SDK's own variables (OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_SERVICE_NAME ...) say where and as whom. The SDK is imported only when tracing is on. Knows no HTTP beyond headers,
and puts no text of a caller into a span.
"""

import time
from collections.abc import Mapping
from contextvars import Token
from typing import TYPE_CHECKING, Final

from inferflux import __version__
from inferflux.server.generation import Times

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME: Final = "inferflux"
# A collector that is away must not hold up the server's end.
EXPORT_TIMEOUT_S: Final = 3.0
_NS: Final = 1_000_000_000
_SERVER_ERROR: Final = 500


class Tracing:
    """The tracer of one server. Open it with `open_tracing`, and `close` it at the end."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self.tracer = provider.get_tracer(SERVICE_NAME, __version__)

    def begin(self, name: str, headers: Mapping[str, str]) -> "RequestTrace":
        """Starts a request's span; a W3C `traceparent` among the headers makes it the child of the caller's."""
        return RequestTrace(self, name, headers)

    def close(self) -> None:
        """Sends what is left. Blocks for a few seconds at most."""
        self._provider.shutdown()


class RequestTrace:
    """One request's span, current in the task that made it until `end`."""

    def __init__(self, tracing: Tracing, name: str, headers: Mapping[str, str]) -> None:
        from opentelemetry import context, propagate, trace

        self._tracer = tracing.tracer
        # Spans are stamped in wall-clock time, requests are timed by a clock that never jumps.
        self._offset_ns = time.time_ns() - int(time.monotonic() * _NS)
        # What is not ASCII is none of W3C's, and more than its readers can bear.
        carrier = {name.lower(): value for name, value in headers.items() if value.isascii()}
        parent = propagate.extract(carrier)
        self.span = self._tracer.start_span(name, parent, kind=trace.SpanKind.SERVER)
        self._context: Context = trace.set_span_in_context(self.span)
        self._token: Token[Context] = context.attach(self._context)

    def sequence(self, times: Times, num_tokens: int) -> None:
        """Adds the spans `queue`, `prefill` and `decode` of one sequence, as far as it came."""
        bounds = (times.submitted - times.waited_s, times.scheduled, times.first_token, times.last_token)
        for name, start, end in zip(("queue", "prefill", "decode"), bounds, bounds[1:], strict=False):
            if start is None or end is None:
                return
            span = self._tracer.start_span(name, self._context, start_time=self._ns(start))
            if name == "decode":
                span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
            span.end(self._ns(max(start, end)))

    def end(self, status: int, attributes: Mapping[str, str | int | None]) -> None:
        from opentelemetry import context, trace

        self.span.set_attributes({name: value for name, value in attributes.items() if value not in (None, "")})
        self.span.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            self.span.set_status(trace.StatusCode.ERROR)
        context.detach(self._token)
        self.span.end()

    def _ns(self, monotonic: float) -> int:
        return int(monotonic * _NS) + self._offset_ns


def open_tracing(enabled: bool) -> Tracing | None:
    """Returns the tracing of this process; None when it is off."""
    if not enabled:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource({"service.name": SERVICE_NAME, "service.version": __version__})
    provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=EXPORT_TIMEOUT_S)))
    return Tracing(provider)


def trace_headers() -> dict[str, str]:
    """Returns the headers that hand the current span on to a server that is called."""
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers
