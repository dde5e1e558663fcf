"""Tracing against a collector that reads OTLP with OpenTelemetry's own messages."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from inferflux.server import tracing
from tests.support.http_server import MODEL, running_server
from tests.support.waiting import PATIENCE_S

TRACED: dict[str, Any] = {
    "server": {"enable_tracing": True},
    "models": [{"id": MODEL, "path": "stub"}],
    "auth": {"allow_anonymous": True},
}
CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"}
PROMPT = "the quick canary"


class Collector:
    """What OTLP delivered, and what the policy service was sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self.asked: list[str | None] = []
        self.raw = b""

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.raw += body
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource |= {one.key: one.value.string_value for one in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans += scope.spans
        return web.Response()

    async def allow(self, request: web.Request) -> web.Response:
        self.asked.append(request.headers.get("traceparent"))
        return web.json_response({"result": True})

    def named(self, name: str) -> Span:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.receive)
    app.router.add_post("/allow", collector.allow)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", PATIENCE_S)
    collector.url = url  # type: ignore[attr-defined]
    yield collector
    await runner.cleanup()


def attributes(span: Span) -> dict[str, Any]:
    values = {one.key: one.value for one in span.attributes}
    return {key: value.string_value or value.int_value for key, value in values.items()}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_with_its_phases(collector: Collector, stream: bool) -> None:
    before = time.time_ns()
    async with running_server(TRACED) as site:
        body = {"prompt": PROMPT, "max_tokens": 5, "stream": stream}
        headers = {**TRACEPARENT, "x-request-id": "mine"}
        async with site.session.post(site.url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
            await response.read()
    request = collector.named("POST /v1/completions")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (CALLER_TRACE, CALLER_SPAN)
    assert request.kind == Span.SPAN_KIND_SERVER
    seen = attributes(request)
    assert seen["http.response.status_code"] == 200
    assert seen["inferflux.request_id"] == "mine"
    assert seen["gen_ai.request.model"] == MODEL
    assert seen["gen_ai.usage.output_tokens"] == 5
    phases = [collector.named(name) for name in ("queue", "prefill", "decode")]
    assert {span.parent_span_id for span in phases} == {request.span_id}
    times = [time for span in phases for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    assert before - 10**9 <= times[0], "by the same clock"
    assert times[-1] <= request.end_time_unix_nano + 1_000_000
    assert collector.resource["service.name"] == "inferflux"


async def test_the_context_goes_out_to_the_policy_service(collector: Collector) -> None:
    guarded = {**TRACED, "guardrails": {"opa_endpoint": collector.url + "/allow", "opa_timeout_ms": 60_000}}  # type: ignore[attr-defined]
    async with running_server(guarded) as site:
        status, _ = await site.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}, headers=TRACEPARENT)
    assert status == 200
    (sent,) = collector.asked
    assert sent is not None
    version, trace_id, span_id, _flags = sent.split("-")
    assert (version, trace_id) == ("00", CALLER_TRACE)
    assert span_id == collector.named("POST /v1/completions").span_id.hex()


async def test_failures_are_marked_and_probes_left_out(collector: Collector) -> None:
    async with running_server(TRACED) as site:
        site.engine.fail_at = 0
        await site.post("/v1/completions", {"prompt": PROMPT})
        await site.post("/v1/completions", {"prompt": 7})
        await site.get("/healthz")
    by_status = {attributes(span)["http.response.status_code"]: span for span in collector.spans if span.kind == 2}
    assert by_status[500].status.code == Status.STATUS_CODE_ERROR
    assert by_status[400].status.code == Status.STATUS_CODE_UNSET
    assert set(by_status) == {400, 500}


async def test_spans_hold_no_text_of_the_caller(collector: Collector) -> None:
    async with running_server(TRACED) as site:
        await site.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5})
        await site.get(f"/nowhere/{PROMPT}?key={PROMPT}")
    assert collector.spans
    assert b"canary" not in collector.raw


async def test_a_broken_traceparent_starts_a_trace_of_its_own(collector: Collector) -> None:
    async with running_server(TRACED) as site:
        await site.get("/v1/models", headers={"traceparent": "00-zz-zz-zz"})
    span = collector.named("GET /v1/models")
    assert span.trace_id.hex() != CALLER_TRACE
    assert span.parent_span_id == b""


@pytest.mark.parametrize("name", [b"baggage", b"tracestate", b"traceparent"])
async def test_headers_that_are_no_text_fail_no_request(collector: Collector, name: bytes) -> None:
    """The SDK's reader of baggage raises on them, before anybody has shown a key."""
    async with running_server(TRACED) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + name + b": a=\xff\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_without_a_collector_requests_go_on_and_the_end_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    async with running_server(TRACED) as site:
        status, _ = await site.get("/v1/models")
        assert status == 200
        started = time.monotonic()
    assert time.monotonic() - started < 20
