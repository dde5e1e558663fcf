"""Models that are loaded, replaced, unloaded and made the default while the server runs, through the admin API."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferflux.errors import ModelLoadError
from inferflux.server.backends import manager
from inferflux.server.http.context import CONTEXT
from tests.support.fake_engine import REPLY
from tests.support.http_server import KEY, Site, endless_loads, running_server
from tests.support.waiting import PATIENCE_S, until

MODELS, DEFAULT, COMPLETIONS = "/v1/admin/models", "/v1/admin/models/default", "/v1/completions"
ADMIN = {"Authorization": f"Bearer {KEY}"}


def config(**others: Any) -> dict[str, Any]:
    auth = {"api_keys": [{"key": KEY, "scopes": ["admin", "generate", "read"]}]}
    return {"models": [{"id": "a", "path": "stub"}], "auth": auth, **others}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running_server(config()) as site:
        yield site


async def call(site: Site, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with site.session.request(method, site.url + path, json=body, headers=ADMIN) as response:
        return response.status, await response.json()


async def load(site: Site, model_id: str, path: str = "stub", **others: Any) -> tuple[int, Any]:
    return await call(site, "POST", MODELS, {"id": model_id, "path": path, **others})


async def complete(site: Site, model_id: str | None = None, **others: Any) -> tuple[int, Any]:
    return await call(site, "POST", COMPLETIONS, {"model": model_id, "prompt": "Hi", "max_tokens": 100, **others})


async def ids(site: Site) -> dict[str, str]:
    return {one["id"]: one["state"] for one in (await call(site, "GET", "/v1/models"))[1]["data"]}


def stream(site: Site, model_id: str | None = None) -> "asyncio.Task[list[Any]]":
    body = {"model": model_id, "prompt": "Hi", "max_tokens": 100}
    return asyncio.create_task(site.events(COMPLETIONS, body, headers=ADMIN))


def text_of(events: list[Any]) -> str:
    assert events[-1] == "[DONE]", events[-1]
    return "".join(event["choices"][0]["text"] for event in events[:-1])


async def test_a_model_from_loading_to_unloading(site: Site):
    status, card = await load(site, "b", dtype="float32", max_model_len=64, idle_unload_s=30)
    assert status == 200
    assert (card["state"], card["origin"], card["default"], card["stub"]) == ("ready", "api", False, True)
    assert [one["state"] for one in card["engines"]] == ["ready"]
    assert site.backends.find("b").source.model.max_model_len == 64
    assert (await complete(site, "b"))[1]["model"] == "b"
    assert await call(site, "PUT", DEFAULT, {"id": "b"}) == (200, {"id": "b"})
    assert (await complete(site))[1]["model"] == "b"
    assert await call(site, "DELETE", MODELS, {"id": "b"}) == (200, {"id": "b", "state": "unloaded", "deleted": True})
    status, body = await complete(site, "b")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert (await complete(site))[1]["model"] == "a"
    _, listed = await call(site, "GET", MODELS)
    assert (listed["default"], listed["unloaded"], listed["registry"]) == ("a", [], None)
    events = [event["event"] for event in listed["events"] if event["model"] == "b"]
    assert events == ["loaded", "default", "draining", "unloaded"]
    counter = "inferflux_model_events_total"
    assert site.metrics.registry.get_sample_value(counter, {"model": "b", "event": "unloaded"}) == 1


async def test_a_swap_lets_what_runs_finish_and_sends_new_requests_to_the_new_one(site: Site, tmp_path: Path):
    old = site.engine
    old.gate.clear()
    running = stream(site, "a")
    await until(lambda: old.num_running)
    old.reply = "from the old one"
    status, card = await load(site, "a", str(tmp_path))
    assert status == 200
    assert sorted(one["state"] for one in card["engines"]) == ["draining", "ready"]
    new = site.engines["a"]
    assert new is not old
    new.reply = "from the new one"
    assert (await complete(site))[1]["choices"][0]["text"] == "from the new one"
    assert await ids(site) == {"a": "ready"}
    old.gate.set()
    assert text_of(await running) == REPLY
    await until(lambda: old.state.value == "closed")
    assert len(site.backends.engines) == 1


async def test_a_swap_holds_no_more_than_two_of_a_model(site: Site, tmp_path: Path):
    old = site.engine
    old.gate.clear()
    running = stream(site, "a")
    await until(lambda: old.num_running)
    (tmp_path / "one").mkdir()
    await load(site, "a", str(tmp_path / "one"))
    middle = site.engines["a"]
    loading = asyncio.create_task(load(site, "a", str(tmp_path)))
    await until(lambda: site.engines["a"] is not middle)
    await asyncio.sleep(0.1)
    assert site.engines["a"].state.value == "starting", "it waits until the first one has gone"
    old.gate.set()
    await running
    assert (await loading)[0] == 200


async def test_unloading_lets_what_runs_finish_and_nothing_new_in(site: Site):
    await load(site, "b")
    engine = site.engines["b"]
    engine.gate.clear()
    running = stream(site, "b")
    await until(lambda: engine.num_running)
    unloading = asyncio.create_task(call(site, "DELETE", MODELS, {"id": "b"}))
    await until(lambda: site.backends.find("b").state.value == "draining")
    assert await ids(site) == {"a": "ready", "b": "draining"}
    assert (await complete(site, "b"))[0] == 404
    assert (await call(site, "GET", "/healthz"))[1]["status"] == "ok"
    assert not unloading.done()
    engine.gate.set()
    assert text_of(await running) == REPLY
    assert (await unloading)[1]["state"] == "unloaded"
    assert engine.state.value == "closed"
    assert await ids(site) == {"a": "ready"}


async def test_what_takes_longer_than_a_request_may_goes_on(tmp_path: Path):
    async with running_server(config()) as site:
        server, backend = site.app[CONTEXT].config.server, site.backends.find("a")
        msgspec.structs.force_setattr(server, "request_timeout_s", 0.3)
        with backend.hold():
            status, body = await call(site, "DELETE", MODELS, {"id": "a"})
            assert (status, body["state"]) == (202, "draining")
        msgspec.structs.force_setattr(server, "request_timeout_s", PATIENCE_S)
        await until(lambda: not site.backends.engines)
        assert (await call(site, "GET", "/readyz"))[1]["reason"] == "no_model"
        status, body = await complete(site)
        assert (status, body["error"]["code"]) == (503, "no_model")
        assert (await load(site, "a"))[0] == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "b", "path": "/no/such/folder"}, "path"),
        ({"id": "b"}, "path"),
        ({"path": "stub"}, "id"),
        ({"id": "-b", "path": "stub"}, "id"),
        ({"id": "b", "path": "stub", "backend": "tpu"}, "backend"),
        ({"id": "b", "path": "stub", "default": "yes"}, "default"),
        ({"id": "b", "path": "stub", "max_model_len": 0}, "max_model_len"),
        ({"id": "b", "path": "stub", "weights": 1}, "weights"),
    ],
)
async def test_bad_loads_are_refused_by_field(site: Site, body: Any, param: str):
    status, answer = await call(site, "POST", MODELS, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert await ids(site) == {"a": "ready"}


async def test_a_load_that_fails_changes_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    make = site.backends._make_client

    def broken(source: Any) -> Any:
        engine = make(source)
        engine.load_error = ModelLoadError("a: needs 3 GiB more than there is")
        return engine

    monkeypatch.setattr(site.backends, "_make_client", broken)
    status, answer = await load(site, "a", str(tmp_path))
    assert (status, answer["error"]["code"]) == (400, "model_load_failed")
    lines = [record for record in caplog.records if "asked for failed" in record.message]
    assert [line.request_id.startswith("req_") for line in lines] == [True]  # type: ignore[attr-defined]
    assert "3 GiB more" in answer["error"]["message"]
    assert (await complete(site))[0] == 200
    assert site.policy.document.models.loaded == ()
    assert (await load(site, "b"))[0] == 400
    assert await ids(site) == {"a": "ready"}


async def test_the_same_load_twice_is_one(site: Site):
    await load(site, "b")
    engine = site.engines["b"]
    assert (await load(site, "b", default=True))[0] == 200
    assert site.engines["b"] is engine
    assert (await complete(site))[1]["model"] == "b"


async def test_unloading_gives_up_a_load_under_way(site: Site):
    with endless_loads(site):
        loading = asyncio.create_task(load(site, "b"))
        await until(lambda: "b" in site.engines)
    assert (await ids(site))["b"] == "loading"
    assert (await complete(site, "b"))[1]["error"]["code"] == "starting"
    status, body = await call(site, "PUT", DEFAULT, {"id": "b"})
    assert (status, body["error"]["code"]) == (503, "starting")
    assert (await call(site, "DELETE", MODELS, {"id": "b"}))[1]["state"] == "unloaded"
    status, body = await loading
    assert (status, body["error"]["code"]) == (409, "superseded")
    assert await ids(site) == {"a": "ready"}
    assert site.policy.document.models.loaded == ()


async def test_a_load_that_the_end_of_the_server_meets_is_told_so(site: Site):
    with endless_loads(site):
        loading = asyncio.create_task(load(site, "b"))
        await until(lambda: "b" in site.engines)
    await site.backends.close()
    status, body = await loading
    assert (status, body["error"]["code"]) == (503, "draining")


async def test_what_is_not_there(site: Site):
    for method, path in (("DELETE", MODELS), ("PUT", DEFAULT)):
        status, body = await call(site, method, path, {"id": "zz"})
        assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_changes_survive_a_restart(tmp_path: Path):
    tree = config(policy={"store": str(tmp_path / "policy")})
    tree["models"].append({"id": "c", "path": "stub"})
    async with running_server(tree) as site:
        await load(site, "b", default=True)
        await call(site, "DELETE", MODELS, {"id": "a"})
    async with running_server(tree) as site:
        assert await ids(site) == {"c": "ready", "b": "ready"}
        assert (await complete(site))[1]["model"] == "b"
        assert (await call(site, "GET", MODELS))[1]["unloaded"] == ["a"]
        assert await call(site, "PUT", DEFAULT, {"id": None}) == (200, {"id": "c"})
        assert (await load(site, "a"))[0] == 200
        assert (await call(site, "GET", MODELS))[1]["unloaded"] == []


async def test_counters_outlive_a_model_and_go_on_when_it_comes_back():
    """A counter that vanished would lose what was counted since the last look, and begin anew."""
    async with running_server(config()) as site:
        for past in (0, 7):
            assert (await load(site, "b"))[0] == 200
            assert await counted(site, "b") == past
            site.engines["b"].stats.generation_tokens = 7
            assert (await call(site, "DELETE", MODELS, {"id": "b"}))[0] == 200
            assert await counted(site, "b") == past + 7


async def counted(site: Site, model_id: str) -> float:
    async with site.session.get(site.url + "/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        samples = [sample for family in families for sample in family.samples]
    (value,) = (
        sample.value
        for sample in samples
        if sample.name == "inferflux_generation_tokens_total" and sample.labels["model"] == model_id
    )
    return value


async def test_idle_models_are_unloaded_and_come_back_for_a_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manager, "CHECK_INTERVAL_S", 0.01)
    tree = config(models=[{"id": "a", "path": "stub", "idle_unload_s": 0.1}])
    async with running_server(tree) as site:
        first, backend = site.engine, site.backends.find("a")
        first.stats.generation_tokens = 7
        house = asyncio.create_task(site.backends.run_maintenance())
        await until(lambda: backend.state.value == "unloaded")
        assert first.state.value == "closed"
        house.cancel()
        assert (await call(site, "GET", "/readyz"))[0] == 200
        assert (await call(site, "GET", "/healthz"))[1]["status"] == "ok"
        assert (await call(site, "POST", "/tokenize", {"prompt": "Hi"}))[0] == 200
        assert backend.state.value == "unloaded", "tokenising needs no engine"
        answers = await asyncio.gather(*(complete(site) for _ in range(3)))
        assert [status for status, _ in answers] == [200] * 3
        assert len(site.engine.submitted) == 3
        assert site.backends.counts("a").counts()["generation_tokens"] == 7
        backend.last_used = 0.0
        with backend.hold():
            assert not await backend.sleep(), "what is in use is not idle"


async def test_a_model_that_does_not_wake_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    async with running_server(config()) as site:
        backend, make = site.backends.find("a"), site.backends._make_client
        await backend.sleep()
        monkeypatch.setattr(backend, "_make_client", lambda source: failing(make(source)))

        def failing(engine: Any) -> Any:
            engine.load_error = ModelLoadError("no memory")
            return engine

        status, body = await complete(site)
        assert (status, body["error"]["code"]) == (503, "no_model")
        assert "memory" not in body["error"]["message"]
        assert (await call(site, "GET", "/readyz"))[0] == 503
        monkeypatch.setattr(backend, "_make_client", make)
        backend.retry()
        assert backend.state.value == "failed", "not at once"
        backend._next_try = 0.0
        backend.retry()
        await until(lambda: backend.state.value == "ready")
        assert (await complete(site))[0] == 200


async def test_who_waits_for_a_model_when_the_server_ends_gets_an_answer(monkeypatch: pytest.MonkeyPatch):
    async with running_server(config()) as site:
        backend, make = site.backends.find("a"), site.backends._make_client
        await backend.sleep()

        def endless(source: Any) -> Any:
            engine = make(source)
            engine.may_load.clear()
            return engine

        monkeypatch.setattr(backend, "_make_client", endless)
        waiting = asyncio.create_task(complete(site))
        await until(lambda: backend.state.value == "loading")
        await site.backends.close()
        status, body = await waiting
        assert (status, body["error"]["code"]) == (503, "starting")


async def test_only_administrators_may(site: Site):
    for method, path in (("GET", MODELS), ("POST", MODELS), ("DELETE", MODELS), ("PUT", DEFAULT)):
        async with site.session.request(method, site.url + path, json={"id": "a"}) as response:
            assert response.status == 401


async def test_a_model_takes_no_more_requests_than_it_may(site: Site):
    await load(site, "b", max_requests=2)
    engine = site.engines["b"]
    engine.gate.clear()
    running = [stream(site, "b") for _ in range(2)]
    await until(lambda: engine.num_running == 2)
    status, body = await complete(site, "b")
    assert (status, body["error"]["code"]) == (429, "queue_full")
    assert (await complete(site, "a"))[0] == 200, "others are not held up"
    engine.gate.set()
    await asyncio.gather(*running)
    assert (await complete(site, "b"))[0] == 200
