"""Loading, finding and closing models, with engines that do as they are told."""

from pathlib import Path

import msgspec
import pytest

from inferflux.config import Config
from inferflux.engine.service.client import ClientState
from inferflux.errors import EngineDeadError, ModelLoadError
from inferflux.server.backends import BackendManager, BackendState
from inferflux.server.errors import NotReadyError, UnknownModelError
from inferflux.server.model_source import find_sources
from tests.support.fake_engine import FakeEngine
from tests.support.http_server import text_bundle
from tests.support.waiting import patience


class House:
    """A manager over fake engines, and what it was told."""

    def __init__(self, *ids: str, default: str | None = None) -> None:
        models = [{"id": one, "path": "stub", "default": one == default} for one in ids]
        self.engines: dict[str, FakeEngine] = {}
        self.events: list[tuple[str, str]] = []
        self.text_error: Exception | None = None
        self.manager = BackendManager(
            find_sources(msgspec.convert({"models": models}, Config)),
            self._make,
            load_text=self._load_text,
            on_event=lambda backend, event: self.events.append((backend.id, event)),
        )

    def _make(self, source):
        self.engines[source.model.id] = FakeEngine(text_bundle())
        return self.engines[source.model.id]

    def _load_text(self, path: Path, template: str | None):
        if self.text_error is not None:
            raise self.text_error
        return text_bundle()


async def test_models_load_side_by_side_and_one_failure_stays_its_own():
    house = House("a", "b", "c")
    house.engines["b"].load_error = ModelLoadError("config.json: no such file")
    await house.manager.load_all()
    states = {backend.id: backend.state for backend in house.manager.backends}
    assert states == {"a": BackendState.READY, "b": BackendState.FAILED, "c": BackendState.READY}
    assert sorted(house.events) == [("a", "loaded"), ("b", "failed"), ("c", "loaded")]
    assert house.manager.find("b").error == "config.json: no such file"
    assert house.engines["b"].state is ClientState.CLOSED
    with pytest.raises(NotReadyError, match="failed to load"):
        house.manager.find("b").require_ready()


@pytest.mark.parametrize("error", [ModelLoadError("no tokenizer"), ValueError("a bug")])
async def test_a_text_side_that_fails_ends_the_engine_too(error: Exception):
    house = House("a")
    house.text_error = error
    house.engines["a"].may_load.clear()  # the engine would load for ever
    await house.manager.load_all()
    backend = house.manager.find("a")
    assert backend.state is BackendState.FAILED
    assert str(error) in (backend.error or "")
    assert house.engines["a"].state is ClientState.CLOSED
    assert house.manager.not_ready_reason() == "no_model"


async def test_an_engine_that_dies_while_loading():
    house = House("a")
    house.engines["a"].load_error = EngineDeadError("the engine of model a died while loading")
    await house.manager.load_all()
    assert house.manager.find("a").state is BackendState.FAILED


async def test_the_default_is_the_marked_one_or_the_first():
    assert House("a", "b", default="b").manager.find(None).id == "b"
    assert House("a", "b").manager.find(None).id == "a"


async def test_finding():
    manager = House("org/model", "b").manager
    assert manager.find("org/model").id == "org/model"
    for wrong in ("org/Model", "", "c"):
        with pytest.raises(UnknownModelError, match="does not exist"):
            manager.find(wrong)


async def test_readiness_follows_the_default_model():
    house = House("a", "b")
    assert house.manager.not_ready_reason() == "starting"
    with pytest.raises(NotReadyError, match="is loading"):
        _ = house.manager.find("a").text
    await house.manager.load_all()
    assert house.manager.not_ready_reason() is None
    house.engines["b"].state = ClientState.RESTARTING
    assert house.manager.not_ready_reason() is None
    house.engines["a"].state = ClientState.RESTARTING
    assert house.manager.not_ready_reason() == "engine_restarting"
    assert house.manager.find("a").state is BackendState.RESTARTING
    assert house.manager.find("a").text is text_bundle(), "tokenising needs no engine"
    await house.manager.close()
    assert all(engine.state is ClientState.CLOSED for engine in house.engines.values())


async def test_the_counts_of_models_that_are_gone_are_bounded(monkeypatch: pytest.MonkeyPatch):
    """Else every id ever loaded had its series on the metrics page for ever."""
    monkeypatch.setattr("inferflux.server.backends.manager.MAX_PAST", 2)
    house = House("a", "b", "c", "d")
    await house.manager.load_all()
    house.engines["a"].stats.generation_tokens = 7
    for gone, kept in (("a", "bcd"), ("b", "cd"), ("c", "d")):
        house.manager.settle((), tuple(kept), None)
        async with patience():
            await house.manager.gone(gone)
        assert house.manager.counts("a").counts()["generation_tokens"] == (0 if gone == "c" else 7)
    assert set(house.manager.counted) == {"b", "c", "d"}


def break_close(engine: FakeEngine) -> None:
    async def close() -> None:
        raise OSError("it does not end")

    engine.close = close  # type: ignore[method-assign]


async def test_a_model_whose_engine_does_not_end_well_leaves_all_the_same(caplog: pytest.LogCaptureFixture):
    house = House("a", "b")
    await house.manager.load_all()
    break_close(house.engines["b"])
    house.manager.settle((), ["a"], None)
    async with patience():
        await house.manager.gone("b")
    assert [backend.id for backend in house.manager.engines] == ["a"]
    assert ("b", "unloaded") in house.events
    assert "ending model b failed" in caplog.text
    with pytest.raises(UnknownModelError, match="does not exist"):
        house.manager.find("b")


async def test_closing_ends_every_engine_though_one_does_not_end_well(caplog: pytest.LogCaptureFixture):
    house = House("a", "b")
    await house.manager.load_all()
    break_close(house.engines["a"])
    await house.manager.close()
    assert house.engines["b"].state is ClientState.CLOSED
    assert "ending model a failed" in caplog.text
