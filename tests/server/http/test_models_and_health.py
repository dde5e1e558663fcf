"""What probes, dashboards and clients are told of models and health, from the start to the end of a server."""

import asyncio
from typing import Any

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from inferflux.engine.service.client import ClientState
from inferflux.engine.stats import EngineStats
from inferflux.errors import ModelLoadError
from tests.support.fake_engine import WINDOW
from tests.support.http_server import MODEL, Site, running_server, text_bundle

TWO: dict[str, Any] = {
    "models": [{"id": "first", "path": "stub"}, {"id": "org/second:v1", "path": "/no/such/folder", "default": True}],
    "auth": {"allow_anonymous": True},
}
# Contract, section 4: name and type.
METRICS = {
    "inferflux_queue_depth": "gauge",
    "inferflux_kv_pages_in_use": "gauge",
    "inferflux_stream_tokens_total": "counter",
    "inferflux_guardrail_blocks_total": "counter",
    "inferflux_requests_total": "counter",
    "inferflux_request_duration_seconds": "histogram",
    "inferflux_time_to_first_token_seconds": "histogram",
    "inferflux_inter_token_latency_seconds": "histogram",
    "inferflux_queue_wait_seconds": "histogram",
    "inferflux_prompt_tokens_total": "counter",
    "inferflux_generation_tokens_total": "counter",
    "inferflux_running_requests": "gauge",
    "inferflux_batch_tokens": "gauge",
    "inferflux_kv_pages_total": "unknown",
    "inferflux_prefix_cache_hit_tokens_total": "counter",
    "inferflux_prefix_cache_query_tokens_total": "counter",
    "inferflux_kv_transfer_seconds": "histogram",
    "inferflux_kv_transfer_bytes_total": "counter",
    "inferflux_preemptions_total": "counter",
    "inferflux_auth_failures_total": "counter",
    "inferflux_rate_limited_total": "counter",
    "inferflux_model_ready": "gauge",
    "inferflux_model_events_total": "counter",
    "inferflux_model_load_seconds": "gauge",
    "inferflux_engine_restarts_total": "counter",
    "inferflux_audit_records_total": "counter",
    "inferflux_build_info": "gauge",
}
LABELS = {"model", "endpoint", "status", "tier", "reason", "event", "version", "python", "le"}


@pytest.fixture
async def site():
    async with running_server() as site:
        yield site


async def metrics_page(site: Site, accept: str = "") -> str:
    async with site.session.get(site.url + "/metrics", headers={"Accept": accept}) as response:
        assert response.status == 200
        return await response.text()


async def sample(site: Site, name: str, **labels: str) -> float:
    page = await metrics_page(site)
    found = [one for family in parse_text(page) for one in family.samples if one.name == name]
    return sum(one.value for one in found if labels.items() <= one.labels.items())


async def test_refusals_are_counted_from_the_start(site: Site):
    page = await metrics_page(site)
    for reason in ("missing", "malformed", "unknown", "invalid", "expired", "unavailable"):
        assert f'inferflux_auth_failures_total{{reason="{reason}"}} 0.0' in page


async def test_probes_while_loading_then_ready_then_restarting_then_draining():
    async with running_server(load=False) as site:
        engine = site.engine
        engine.may_load.clear()
        loading = asyncio.create_task(site.backends.load_all())
        assert await site.get("/livez") == (200, {"status": "ok"})
        assert await site.get("/readyz") == (503, {"status": "unavailable", "reason": "starting"})
        _, models = await site.get("/v1/models")
        assert (models["data"][0]["state"], models["data"][0]["max_model_len"]) == ("loading", None)
        for path, body in (("/v1/completions", {"prompt": "Hi"}), ("/tokenize", {"prompt": "Hi"})):
            async with site.session.post(site.url + path, json=body) as response:
                assert (response.status, response.headers["Retry-After"]) == (503, "2")
        async with site.session.get(site.url + "/readyz") as response:
            assert response.headers["Retry-After"] == "2"
        engine.may_load.set()
        await loading
        assert await site.get("/readyz") == (200, {"status": "ok"})
        engine.state = ClientState.RESTARTING
        assert await site.get("/readyz") == (503, {"status": "unavailable", "reason": "engine_restarting"})
        assert (await site.get("/livez"))[0] == (await site.get("/health"))[0] == 200
        engine.stuck = True
        assert (await site.get("/livez"))[0] == (await site.get("/health"))[0] == 503
        assert (await site.post("/v1/completions", {"prompt": "Hi"}))[0] == 503
        engine.state = ClientState.READY
        site.admission.close()
        assert await site.get("/readyz") == (503, {"status": "unavailable", "reason": "draining"})
        assert await refusal(site) == (503, "draining")
        assert (await site.get("/healthz"))[1]["status"] == "degraded"
        await site.backends.close()
        assert await refusal(site) == (503, "draining"), "an engine that is ended does not restart"


async def refusal(site: Site) -> tuple[int, str]:
    status, body = await site.post("/v1/completions", {"prompt": "Hi"})
    return status, body["error"]["code"]


async def test_a_model_that_fails_to_load():
    async with running_server(load=False) as site:
        site.engine.load_error = ModelLoadError("/secret/path: broken")
        await site.backends.load_all()
        assert await site.get("/readyz") == (503, {"status": "unavailable", "reason": "no_model"})
        assert (await site.get("/v1/models"))[1]["data"][0]["state"] == "failed"
        status, body = await site.post("/v1/completions", {"prompt": "Hi"})
        assert status == 503
        assert "secret" not in body["error"]["message"]
        assert await sample(site, "inferflux_model_events_total", model=MODEL, event="failed") == 1
        assert await sample(site, "inferflux_model_ready") == 0


async def test_model_list_and_single_models():
    async with running_server(TWO) as site:
        _, body = await site.get("/v1/models")
        assert body["object"] == "list"
        first, second = body["data"]
        assert first == {
            "id": "first",
            "object": "model",
            "created": first["created"],
            "owned_by": "inferflux",
            "backend": "cpu",
            "state": "ready",
            "default": False,
            "stub": True,
            "max_model_len": WINDOW,
        }
        assert (second["id"], second["default"], second["stub"]) == ("org/second:v1", True, True)
        for path in ("/v1/models/org/second:v1", "/v1/models/org%2Fsecond%3Av1"):
            assert await site.get(path) == (200, second)
        _, answer = await site.post("/v1/completions", {"prompt": "Hi"})
        assert answer["model"] == "org/second:v1"
        _, answer = await site.post("/v1/completions", {"model": "first", "prompt": "Hi"})
        assert answer["model"] == "first"
        assert len(site.engines["first"].submitted) == 1


async def test_healthz(site: Site):
    _, body = await site.get("/healthz")
    assert body.pop("uptime_s") >= 0
    assert body.pop("version")
    models = [{"id": MODEL, "state": "ready", "default": True}]
    assert body == {"status": "ok", "queue": {"running": 0, "waiting": 0}, "models": models}


async def test_tokenize_and_back(site: Site):
    for prompt in ("Hello, wörld 😀", "", "<|start|>x", " space"):
        _, body = await site.post("/tokenize", {"model": MODEL, "prompt": prompt})
        assert body["tokens"] == text_bundle().tokenizer.encode(prompt, add_special_tokens=True)
        assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), WINDOW)
        assert await site.post("/detokenize", {"model": MODEL, "tokens": body["tokens"]}) == (200, {"prompt": prompt})
    messages = [{"role": "user", "content": "Hi"}]
    _, body = await site.post("/tokenize", {"messages": messages})
    await site.post("/v1/chat/completions", {"messages": messages})
    assert body["tokens"] == site.engine.submitted[0].prompt_token_ids


async def test_tokenize_with_and_without_what_is_added(site: Site):
    """As vLLM's clients ask: to count a text by itself, or a conversation that is not the model's turn."""
    tokenizer = text_bundle().tokenizer
    bos = tokenizer.bos_token_id
    turn = "<|start|>user\nHi<|end|>\n"
    messages = {"messages": [{"role": "user", "content": "Hi"}]}

    async def tokens(body: dict[str, Any]) -> list[int]:
        status, answer = await site.post("/tokenize", body)
        assert status == 200, answer
        assert answer["count"] == len(answer["tokens"])
        return answer["tokens"]

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert await tokens({"prompt": "Hi", "add_special_tokens": False}) == plain("Hi")
    for added in ({}, {"add_special_tokens": True}, {"add_special_tokens": None}):
        assert await tokens({"prompt": "Hi", **added}) == [bos, *plain("Hi")]
    assert await tokens({**messages, "add_generation_prompt": False}) == plain(turn)
    asked = plain(turn + "<|start|>assistant\n")
    for added in ({}, {"add_generation_prompt": True, "add_special_tokens": False}, {"add_generation_prompt": None}):
        assert await tokens({**messages, **added}) == asked
    assert await tokens({**messages, "add_special_tokens": True}) == [bos, *asked]


async def test_every_metric_of_the_contract_is_there_with_its_type(site: Site):
    await site.post("/v1/completions", {"prompt": "Hi"})
    families = {family.name: family for family in parse_text(await metrics_page(site))}
    for name, kind in METRICS.items():
        family = families[name.removesuffix("_total") if kind == "counter" else name]
        assert (family.type, bool(family.documentation)) == (kind, True), name
        for one in family.samples:
            assert set(one.labels) <= LABELS, name
    assert {name for name in families if not name.startswith("inferflux_")} == set()
    tiers = {one.labels["tier"] for one in families["inferflux_kv_pages_in_use"].samples}
    assert tiers == {"device", "cpu", "nvme"}


async def test_openmetrics_when_asked_for(site: Site):
    page = await metrics_page(site, "application/openmetrics-text; version=1.0.0")
    assert page.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(page)}
    assert {"inferflux_requests", "inferflux_kv_pages_total"} <= names
    assert "_created" not in page


@pytest.mark.parametrize("version", ["abc", "", "1.x", "\xff"])
async def test_an_accept_header_with_a_strange_version_gets_a_page_all_the_same(site: Site, version: str):
    for kind in ("application/openmetrics-text", "text/plain"):
        assert "# HELP inferflux_requests" in await metrics_page(site, f"{kind}; version={version}")


async def test_the_numbers_move(site: Site):
    _, whole = await site.post("/v1/completions", {"prompt": "Hi", "max_tokens": 10})
    await site.events("/v1/completions", {"prompt": "Hi", "max_tokens": 10, "n": 2})
    assert whole["usage"]["completion_tokens"] == 10
    for name, value in {
        "inferflux_stream_tokens_total": 20,
        "inferflux_time_to_first_token_seconds_count": 3,
        "inferflux_inter_token_latency_seconds_count": 27,
        "inferflux_queue_wait_seconds_count": 3,
    }.items():
        assert await sample(site, name, model=MODEL) == value, name
    labels = {"endpoint": "/v1/completions", "status": "200", "model": MODEL}
    assert await sample(site, "inferflux_requests_total", **labels) == 2
    assert await sample(site, "inferflux_request_duration_seconds_count", endpoint="/v1/completions") == 2


async def test_prompt_tokens_are_those_of_the_usage_figures(site: Site):
    """A prompt counts once, whatever its choices, candidates and whoever else is in the request."""
    asked: list[tuple[str, dict[str, object]]] = [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/completions", {"prompt": "Hi there", "max_tokens": 2, "n": 3}),
        ("/v1/completions", {"prompt": "Hi there", "max_tokens": 2, "n": 2, "best_of": 4}),
        ("/v1/completions", {"prompt": ["Hi", "Hi", "ho ho"], "max_tokens": 2, "n": 2}),
        ("/v1/completions", {"prompt": "Hi there", "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "n": 2}),
        ("/v1/embeddings", {"input": ["Hi", "Hi", "ho ho"]}),
    ]
    total = 0
    for path, body in asked:
        _, answer = await site.post(path, body)
        total += answer["usage"]["prompt_tokens"]
        assert await sample(site, "inferflux_prompt_tokens_total", model=MODEL) == total, body
    body = {"prompt": "Hi there", "max_tokens": 2, "n": 3, "stream_options": {"include_usage": True}}
    *_, last, _done = await site.events("/v1/completions", body)
    total += last["usage"]["prompt_tokens"]
    assert await sample(site, "inferflux_prompt_tokens_total", model=MODEL) == total


async def test_labels_stay_bounded_whatever_is_sent(site: Site):
    for index in range(5):
        await site.post("/v1/completions", {"model": f"evil{index}", "prompt": "Hi"})
        await site.get(f"/evil/{index}")
        await site.get(f"/v1/models/evil{index}")
    page = await metrics_page(site)
    assert "evil" not in page
    assert await sample(site, "inferflux_requests_total", model="other", status="404") == 10
    assert await sample(site, "inferflux_requests_total", endpoint="other") == 5


async def test_engine_counters_go_on_over_a_restart(site: Site):
    engine = site.engine
    name = "inferflux_generation_tokens_total"
    engine.stats = EngineStats(generation_tokens=10, device_pages_total=64, device_pages_in_use=7, waiting=2, running=3)
    assert await sample(site, name) == 10
    assert await sample(site, "inferflux_kv_pages_in_use", tier="device") == 7
    assert await sample(site, "inferflux_queue_depth") == 2
    assert await sample(site, "inferflux_running_requests") == 3
    engine.stats = EngineStats(generation_tokens=15)
    assert await sample(site, name) == 15
    engine.num_restarts = 1
    assert await sample(site, name) == 15, "nothing counts twice while the next engine loads"
    engine.stats, engine.num_engines = EngineStats(generation_tokens=4), 2
    assert await sample(site, name) == 19
    engine.num_restarts = 2
    engine.stats, engine.num_engines = EngineStats(generation_tokens=20), 3
    assert await sample(site, name) == 39
    assert await sample(site, "inferflux_engine_restarts_total") == 2


async def test_metrics_can_be_switched_off():
    async with running_server({"server": {"enable_metrics": False}, "auth": {"allow_anonymous": True}}) as site:
        assert (await site.get("/metrics"))[0] == 404


async def test_answers_are_compact_json(site: Site):
    async with site.session.get(site.url + "/v1/models") as response:
        assert response.headers["Content-Type"] == "application/json"
        assert msgspec.json.decode(await response.read())["object"] == "list"
