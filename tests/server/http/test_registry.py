"""registry.yaml, the API and the policy store together, on a running server."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from inferflux.config import ModelConfig
from inferflux.errors import ModelLoadError
from inferflux.server.policy import store_file
from inferflux.server.policy.document import ModelChanges
from tests.support.http_server import KEY, Site, endless_loads, running_server
from tests.support.waiting import until

MODELS = "/v1/admin/models"
ADMIN = {"Authorization": f"Bearer {KEY}"}


class Followed:
    """A server's registry file, looked at when told to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "registry.yaml"
        auth = {"api_keys": [{"key": KEY, "scopes": ["admin", "generate", "read"]}]}
        self.config: dict[str, Any] = {
            "models": [{"id": "base", "path": "stub"}],
            "auth": auth,
            "registry": {"path": str(self.path)},
        }

    def write(self, *models: str, default: str | None = None, **options: Any) -> None:
        extra = "".join(f", {name}: {value}" for name, value in options.items())
        lines = [f"  - {{id: {one}, path: stub, default: {str(one == default).lower()}{extra}}}\n" for one in models]
        self.path.write_text("models:\n" + "".join(lines) if models else "models: []", encoding="utf-8")

    async def look(self, site: Site) -> str | None:
        """Has the registry look; returns its error once the change is over."""
        registry = site.models.registry
        assert registry is not None
        await registry.look(site.models.control.follow, asked=True)
        if registry._attempt is not None:
            await asyncio.gather(registry._attempt, return_exceptions=True)
        return registry.status.error


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    return Followed(tmp_path)


async def listed(site: Site) -> Any:
    return (await site.get(MODELS, headers=ADMIN))[1]


async def states(site: Site) -> dict[str, str]:
    return {one["id"]: one["state"] for one in (await listed(site))["data"]}


async def call(site: Site, method: str, path: str, body: Any) -> int:
    async with site.session.request(method, site.url + path, json=body, headers=ADMIN) as response:
        return response.status


async def test_edits_from_the_start_to_the_end(followed: Followed):
    followed.write("a", "b", default="b")
    async with running_server(followed.config) as site:
        assert await states(site) == {"base": "ready", "a": "ready", "b": "ready"}
        assert (await listed(site))["default"] == "b"
        followed.write("a", "c", default="a")
        assert await followed.look(site) is None
        assert (await listed(site))["default"] == "a"
        await site.backends.gone("b")
        assert await states(site) == {"base": "ready", "a": "ready", "c": "ready"}
        followed.write()
        assert await followed.look(site) is None
        answer = await listed(site)
        assert (answer["default"], answer["registry"]["state"]) == ("base", "ok")
        assert [event["event"] for event in answer["events"] if not event["model"]] == ["registry_applied"] * 3


async def test_an_edit_of_which_one_model_fails_changes_nothing(followed: Followed, monkeypatch: pytest.MonkeyPatch):
    followed.write("a")
    async with running_server(followed.config) as site:
        make = site.backends._make_client

        def make_broken(source: Any) -> Any:
            engine = make(source)
            if source.model.id == "c":
                engine.load_error = ModelLoadError("c: 2 GB more than there is")
            return engine

        monkeypatch.setattr(site.backends, "_make_client", make_broken)
        followed.write("b", "c", default="b")
        assert await followed.look(site) == f"{followed.path}: c: 2 GB more than there is"
        assert await states(site) == {"base": "ready", "a": "ready"}
        assert (await listed(site))["default"] == "base"
        assert site.engines["b"].state.value == "closed", "what was loaded beside it is gone again"
        monkeypatch.setattr(site.backends, "_make_client", make)
        assert await followed.look(site) is None
        assert (await listed(site))["default"] == "b"


async def test_at_the_start_each_model_stands_for_itself(followed: Followed):
    followed.write("a")
    text = followed.path.read_text(encoding="utf-8")
    followed.path.write_text(text + "  - {id: lost, path: /no/such/folder}\n", encoding="utf-8")
    async with running_server(followed.config, load=False) as site:
        await site.backends.load_all()
        assert await states(site) == {"base": "ready", "a": "ready", "lost": "failed"}
        lost = site.backends.find("lost")
        assert (lost.error, lost.source.fallback) == ("/no/such/folder is not a folder", None)


async def test_a_file_that_is_not_there_yet(followed: Followed):
    del followed.config["models"]
    async with running_server(followed.config) as site:
        assert await states(site) == {}
        assert (await site.get("/readyz"))[1]["reason"] == "no_model"
        assert (await listed(site))["registry"]["state"] == "error"
        assert (await site.get("/healthz"))[1]["registry"] == "error"
        followed.write("a")
        assert await followed.look(site) is None
        assert (await site.get("/readyz"))[0] == 200
        health = (await site.get("/healthz"))[1]
        assert (health["status"], health["registry"]) == ("ok", "ok")
        followed.path.write_text("models: nothing", encoding="utf-8")
        assert "must be a list" in (await followed.look(site) or "")
        health = (await site.get("/healthz"))[1]
        assert (health["status"], health["registry"]) == ("degraded", "error")
        assert str(followed.path) not in str(health), "anybody may read it"


async def test_the_api_decides_over_the_file_and_is_remembered(followed: Followed, tmp_path: Path):
    followed.config["policy"] = {"store": str(tmp_path / "policy")}
    followed.write("a", "b")
    async with running_server(followed.config) as site:
        assert await call(site, "POST", MODELS, {"id": "a", "path": "stub", "max_model_len": 77}) == 200
        assert await call(site, "DELETE", MODELS, {"id": "b"}) == 200
        followed.write("a", "b", "c", max_model_len=33)
        assert await followed.look(site) is None
        assert await states(site) == {"base": "ready", "a": "ready", "c": "ready"}
        assert site.backends.find("a").source.model.max_model_len == 77
    async with running_server(followed.config) as site:
        origins = {one["id"]: one["origin"] for one in (await listed(site))["data"]}
        assert origins == {"base": "config", "a": "api", "c": "registry"}
        followed.write("c")
        assert await followed.look(site) is None
        answer = await listed(site)
        assert ([one["id"] for one in answer["data"]], answer["unloaded"]) == (["base", "c", "a"], [])


async def test_what_the_api_decided_can_be_forgotten(followed: Followed, tmp_path: Path):
    """Then each id is again what the file says of it."""
    followed.config["policy"] = {"store": str(tmp_path / "policy")}
    followed.write("a", "b", max_model_len=33)
    async with running_server(followed.config) as site:
        await call(site, "POST", MODELS, {"id": "a", "path": "stub", "max_model_len": 77})
        await call(site, "POST", MODELS, {"id": "x", "path": "stub"})
        await call(site, "DELETE", MODELS, {"id": "b"})
        answers = []
        for model_id in ("a", "b", "x", "base"):
            body = {"id": model_id, "forget": True}
            async with site.session.delete(site.url + MODELS, json=body, headers=ADMIN) as response:
                assert response.status == 200
                answers.append((await response.json())["origin"])
        assert answers == ["registry", "registry", None, "config"]
        assert site.backends.find("a").source.model.max_model_len == 33
        await until(lambda: not any(one.id == "x" for one in site.backends.engines))
        assert await states(site) == {"base": "ready", "a": "ready", "b": "ready"}
        assert site.policy.document.models == ModelChanges()
        assert await call(site, "DELETE", MODELS, {"id": "x", "forget": True}) == 404
    async with running_server(followed.config) as site:
        assert await states(site) == {"base": "ready", "a": "ready", "b": "ready"}


async def test_a_decision_whose_file_does_not_load_stays(followed: Followed):
    followed.write("a")
    async with running_server(followed.config) as site:
        await call(site, "POST", MODELS, {"id": "a", "path": "stub", "max_model_len": 77})
        site.models.control.registered = [ModelConfig(id="a", path="/no/such/folder")]
        assert await call(site, "DELETE", MODELS, {"id": "a", "forget": True}) == 400
        assert site.backends.find("a").source.model.max_model_len == 77
        assert [one.id for one in site.policy.document.models.loaded] == ["a"]


async def test_a_load_by_the_api_takes_the_place_of_an_edit_under_way(followed: Followed):
    followed.write("a")
    async with running_server(followed.config) as site:
        with endless_loads(site):
            followed.write("a", "b", max_model_len=60)
            editing = asyncio.create_task(followed.look(site))
            await until(lambda: "b" in site.engines)
        assert await call(site, "POST", MODELS, {"id": "a", "path": "stub", "max_model_len": 70}) == 200
        assert "replaced this one" in (await editing or "")
        assert await states(site) == {"base": "ready", "a": "ready"}
        assert site.backends.find("a").source.model.max_model_len == 70
        assert await followed.look(site) is None, "it is tried again, and leaves `a` to the API"
        assert await states(site) == {"base": "ready", "a": "ready", "b": "ready"}
        assert site.backends.find("a").source.model.max_model_len == 70


async def test_an_edit_sees_what_the_api_has_forgotten_while_it_loads(followed: Followed):
    """What the edit says of `a` did not matter when it began, and does when it is put in force."""
    followed.write("a", max_model_len=33)
    async with running_server(followed.config) as site:
        await call(site, "POST", MODELS, {"id": "a", "path": "stub", "max_model_len": 77})
        editing = await begin_edit(followed, site)
        assert await call(site, "DELETE", MODELS, {"id": "a", "forget": True}) == 200
        site.engines["b"].may_load.set()
        assert "was made in the meantime" in (await editing or "")
        assert await states(site) == {"base": "ready", "a": "ready"}
        assert await followed.look(site) is None, "it is tried again"
        assert await states(site) == {"base": "ready", "a": "ready", "b": "ready"}
        assert site.backends.find("a").source.model.max_model_len == 60


async def test_what_is_unloaded_while_an_edit_loads_it_stays_away(followed: Followed):
    followed.write("a")
    async with running_server(followed.config) as site:
        editing = await begin_edit(followed, site)
        assert await call(site, "DELETE", MODELS, {"id": "b"}) == 200
        assert "replaced this one" in (await editing or "")
        assert await followed.look(site) is None, "the rest of the edit is put in force"
        assert await states(site) == {"base": "ready", "a": "ready"}
        assert site.backends.find("a").source.model.max_model_len == 60
        assert (await listed(site))["unloaded"] == ["b"]


async def begin_edit(followed: Followed, site: Site) -> "asyncio.Task[str | None]":
    """Begins an edit that changes `a` and adds `b`, which loads for ever."""
    with endless_loads(site, "b"):
        followed.write("a", "b", max_model_len=60)
        editing = asyncio.create_task(followed.look(site))
        await until(lambda: "b" in site.engines)
    return editing


async def test_a_change_that_cannot_be_kept_is_not_made(
    followed: Followed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    followed.config["policy"] = {"store": str(tmp_path / "policy")}
    followed.write("a")
    async with running_server(followed.config) as site:
        monkeypatch.setattr(store_file, "write_file", full)
        assert await call(site, "POST", MODELS, {"id": "b", "path": "stub"}) == 500
        assert await call(site, "DELETE", MODELS, {"id": "a"}) == 500
        assert await call(site, "PUT", MODELS + "/default", {"id": "a"}) == 500
        assert await states(site) == {"base": "ready", "a": "ready"}
        assert (await listed(site))["default"] == "base"
        assert site.engines["b"].state.value == "closed"
