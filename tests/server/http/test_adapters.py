"""Adapters over HTTP: named like models, listed beside them, answered by the engine of the model they adapt."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.http.test_audit import lines
from tests.support.adapters import write_adapter
from tests.support.fake_engine import REPLY
from tests.support.http_server import KEY, MODEL, Site, running_server
from tests.support.models import TinyModel

ADMIN = {"x-api-key": KEY}
SQL, POEMS = "sql", "org/poems:v2"


def config(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "models": [{"id": MODEL, "path": "stub"}, {"id": "other", "path": "stub"}],
        "adapters": [{"id": name, "path": str(folder), "base": MODEL} for name in (SQL, POEMS)],
        "auth": {"api_keys": [{"key": KEY, "scopes": ["admin", "generate", "read"]}]},
        **sections,
    }


@pytest.fixture
async def site(tmp_path: Path):
    async with running_server(config(tmp_path)) as site:
        site.session.headers.update(ADMIN)
        yield site


async def requests_of(site: Site, series: str, model: str) -> float:
    async with site.session.get(site.url + "/metrics") as response:
        page = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in page if line.startswith(series + "{") and f'model="{model}"' in line)


async def test_adapters_are_listed_behind_the_model_they_adapt(site: Site) -> None:
    status, answer = await site.get("/v1/models")
    assert status == 200
    assert [(card["id"], card.get("parent")) for card in answer["data"]] == [
        (MODEL, None),
        (SQL, MODEL),
        (POEMS, MODEL),
        ("other", None),
    ]
    base, sql, *_ = answer["data"]
    assert sql == {**base, "id": SQL, "parent": MODEL, "default": False}
    assert base["default"]
    assert await site.get(f"/v1/models/{POEMS}") == (200, {**sql, "id": POEMS})
    _, admin = await site.get("/v1/admin/models")
    assert [card["adapters"] for card in admin["data"]] == [[SQL, POEMS], []]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 100}),
        ("/v1/embeddings", {"input": "Hi"}),
    ],
)
async def test_an_adapters_id_goes_where_a_models_does(site: Site, path: str, body: dict[str, Any]) -> None:
    status, answer = await site.post(path, {"model": SQL, **body})
    assert (status, answer["model"]) == (200, SQL)
    await site.post(path, {"model": MODEL, **body})
    assert [one.adapter for one in site.engine.submitted] == [SQL, None]


async def test_a_stream_names_the_adapter_in_every_event(site: Site) -> None:
    *events, done = await site.events("/v1/completions", {"model": POEMS, "prompt": "Hi", "max_tokens": 100})
    assert {event["model"] for event in events} == {POEMS}
    assert "".join(event["choices"][0]["text"] for event in events) == REPLY
    assert done == "[DONE]"
    assert site.engine.submitted[0].adapter == POEMS


async def test_every_choice_is_the_adapters(site: Site) -> None:
    await site.post("/v1/completions", {"model": SQL, "prompt": ["Hi", "Ho"], "n": 2})
    assert [one.adapter for one in site.engine.submitted] == [SQL] * 4


async def test_tokens_are_the_models(site: Site) -> None:
    answers = [await site.post("/tokenize", {"model": model, "prompt": "Hi"}) for model in (SQL, MODEL)]
    assert answers[0] == answers[1]
    assert await site.post("/detokenize", {"model": SQL, "tokens": answers[0][1]["tokens"]}) == (200, {"prompt": "Hi"})


async def test_a_prompt_is_warmed_for_the_adapter(site: Site) -> None:
    status, answer = await site.post("/v1/admin/cache/warm", {"model": SQL, "prompt": "Hi there"})
    assert (status, answer["model"]) == (200, SQL)
    assert site.engine.submitted[0].adapter == SQL


async def test_names_that_are_none_are_not_found(site: Site) -> None:
    status, answer = await site.post("/v1/completions", {"model": "sqll", "prompt": "Hi"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert 'did you mean "sql"' in answer["error"]["message"]
    assert (await site.get("/v1/models/sqll"))[0] == 404


async def test_an_adapter_is_no_model_to_load_or_to_unload_or_to_be_the_default(site: Site) -> None:
    status, answer = await site.post("/v1/admin/models", {"id": SQL, "path": "stub"})
    assert (status, answer["error"]["param"]) == (400, "id")
    assert "is an adapter" in answer["error"]["message"]
    async with site.session.put(site.url + "/v1/admin/models/default", json={"id": SQL}) as response:
        refusals = [(response.status, await response.json())]
    async with site.session.delete(site.url + "/v1/admin/models", json={"id": SQL}) as response:
        refusals.append((response.status, await response.json()))
    for status, answer in refusals:
        assert status == 404
        assert answer["error"]["message"] == f'"{SQL}" is not a model but an adapter of "{MODEL}"'


async def test_an_adapter_comes_and_goes_with_its_model(tmp_path: Path) -> None:
    tree = config(tmp_path, registry={"path": str(tmp_path / "registry.yaml")})
    tree["adapters"].append({"id": "late", "path": str(tmp_path), "base": "later"})
    (tmp_path / "registry.yaml").write_text("models: []")
    async with running_server(tree) as site:
        site.session.headers.update(ADMIN)
        ask = {"model": "late", "prompt": "Hi"}
        assert (await site.post("/v1/completions", ask))[0] == 404
        assert (await site.post("/v1/admin/models", {"id": "later", "path": "stub"}))[0] == 200
        assert (await site.post("/v1/completions", ask))[0] == 200
        assert site.engines["later"].submitted[0].adapter == "late"
        async with site.session.delete(site.url + "/v1/admin/models", json={"id": "later"}) as response:
            assert response.status == 200
        assert (await site.post("/v1/completions", ask))[0] == 404


async def test_requests_are_counted_by_adapter_and_tokens_by_model(site: Site) -> None:
    for _ in range(3):
        await site.post("/v1/completions", {"model": SQL, "prompt": "Hi"})
    await site.post("/v1/completions", {"model": "nobody's", "prompt": "Hi"})
    assert await requests_of(site, "inferflux_requests_total", SQL) == 3
    assert await requests_of(site, "inferflux_requests_total", "other") == 1
    assert await requests_of(site, "inferflux_prompt_tokens_total", MODEL) > 0
    assert await requests_of(site, "inferflux_prompt_tokens_total", SQL) == 0


async def test_the_audit_log_names_the_adapter(tmp_path: Path) -> None:
    async with running_server(config(tmp_path, logging={"audit_log": str(tmp_path / "audit.log")})) as site:
        site.session.headers.update(ADMIN)
        await site.post("/v1/completions", {"model": SQL, "prompt": "Hi"})
        await site.post("/v1/completions", {"model": MODEL, "prompt": "Hi"})
    assert [line["model"] for line in lines(tmp_path / "audit.log")] == [SQL, MODEL]


async def test_two_adapters_and_their_model_answer_at_the_same_time(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """Each as transformers does with that adapter merged in; a stream among them."""
    model = tiny_model("qwen2")
    references = {name: write_adapter(tmp_path / name, model.reference) for name in ("one", "two")}
    cases = {
        name: TinyModel(model.folder, reference).clear_case(20, 12)
        for name, reference in {"base": model.reference, **references}.items()
    }
    tree = {
        "models": [{"id": "base", "path": str(model.folder), "dtype": "float32"}],
        "adapters": [{"id": name, "path": str(tmp_path / name), "base": "base"} for name in references],
        "auth": {"allow_anonymous": True},
    }

    async def ask(site: Site, name: str) -> list[int]:
        prompt, _ = cases[name]
        body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        status, answer = await site.post("/v1/completions", {**body, "return_token_ids": True})
        assert (status, answer["model"]) == (200, name)
        return answer["choices"][0]["token_ids"]

    async with running_server(tree, real=True) as site:
        names = [*cases, *cases]
        answers = await asyncio.gather(*(ask(site, name) for name in names))
    assert answers == [cases[name][1] for name in names]
