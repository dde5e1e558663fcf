"""Changes of the served models by the registry and the API at once, at random: what is served in the end is what is
wanted, of requests under way none loses its engine, and no engine is left behind."""

import asyncio
import contextlib
import random

import msgspec
import pytest

from inferflux.config import Config, ModelConfig
from inferflux.engine.service.client import ClientState
from inferflux.engine.service.protocol import ModelInfo
from inferflux.errors import InferFluxError, ModelLoadError
from inferflux.server.backends import BackendManager
from inferflux.server.model_source import ModelSource
from inferflux.server.models.control import ModelControl
from inferflux.server.policy.document import LoadedModel, PolicyDocument
from inferflux.server.policy.store import Change, MemoryKeeper, PolicyStore
from tests.support.fake_engine import FakeEngine
from tests.support.http_server import text_bundle
from tests.support.waiting import patience

IDS = ("base", "a", "b", "c")
WINDOWS = (32, 64, 96)


class Engine(FakeEngine):
    """Loads for a while, and now and then fails to."""

    chance = random.Random(0)

    async def start(self) -> ModelInfo:
        await pause(self.chance)
        if self.chance.random() < 0.15:
            self.load_error = ModelLoadError("no memory")
        return await super().start()


class House:
    """chance: decides everything. engines: all that were ever made. faults: what went wrong for requests."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.engines: list[Engine] = []
        self.faults: list[str] = []
        models = [{"id": "base", "path": "stub"}, {"id": "a", "path": "stub", "max_model_len": 32}]
        self.policy = PolicyStore(PolicyDocument(), MemoryKeeper())
        self.control = ModelControl(msgspec.convert({"models": models}, Config), self.policy, (), self._make_manager)
        self.manager = self.control.manager

    def _make_manager(self, sources: "list[ModelSource]") -> BackendManager:
        def make(_source: ModelSource) -> Engine:
            self.engines.append(Engine(text_bundle()))
            self.engines[-1].chance = self.chance
            return self.engines[-1]

        return BackendManager(sources, make, load_text=lambda _path, _template: text_bundle(), on_event=lambda *_: None)

    async def keep(self, change: Change) -> PolicyDocument:
        return await self.policy.update(change)

    def registered(self) -> list[ModelConfig]:
        ids = self.chance.sample(IDS, self.chance.randrange(4))
        return [ModelConfig(id=one, path="stub", max_model_len=self.chance.choice(WINDOWS)) for one in ids]

    async def change(self) -> None:
        """One change by the API."""
        model_id, control = self.chance.choice(IDS), self.control
        model = LoadedModel(id=model_id, path="stub", max_model_len=self.chance.choice(WINDOWS))
        with contextlib.suppress(InferFluxError):
            match self.chance.randrange(5):
                case 0 | 1:
                    await control.load(model, default=self.chance.random() < 0.3, keep=self.keep)
                case 2:
                    await control.unload(model_id, self.keep)
                case 3:
                    await control.forget(model_id, self.keep)
                case 4:
                    await control.set_default(self.chance.choice((model_id, None)), self.keep)

    async def follow(self) -> None:
        with contextlib.suppress(InferFluxError):
            await self.control.follow(self.registered())

    async def ask(self) -> None:
        """Requests, one after another, until cancelled."""
        while True:
            await pause(self.chance)
            backend = self.manager.serving(self.chance.choice(IDS))
            if backend is None or not backend.serves:
                continue
            with backend.hold():
                client = backend.client
                await pause(self.chance)
                if client.state is not ClientState.READY:
                    self.faults.append(f"{backend.id} lost its engine")


async def pause(chance: random.Random) -> None:
    """Long enough at times for what another task does in a thread."""
    await asyncio.sleep(chance.choice((0.0, 0.0, 0.001, 0.004)))


@pytest.mark.parametrize("seed", range(60))
async def test_what_is_served_in_the_end_is_what_is_wanted(seed: int) -> None:
    house = House(seed)
    requests = [asyncio.create_task(house.ask()) for _ in range(2)]
    changes = [asyncio.create_task(house.manager.load_all())]
    following: asyncio.Task[None] | None = None
    await changes[0]
    for _ in range(house.chance.randrange(3, 14)):
        if house.chance.random() < 0.4:
            if following is not None:
                following.cancel()  # as the registry does with an edit that is overtaken
                await asyncio.gather(following, return_exceptions=True)
            following = asyncio.create_task(house.follow())
        else:
            changes.append(asyncio.create_task(house.change()))
        await pause(house.chance)
    async with patience():
        await asyncio.gather(*changes, *([following] if following is not None else []))
        for model_id in IDS:
            await house.manager.gone(model_id)
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    assert_served(house)
    await house.manager.close()
    assert {engine.state for engine in house.engines} <= {ClientState.CLOSED, ClientState.FAILED}


def assert_served(house: House) -> None:
    wanted, manager = house.control.wanted, house.manager
    assert house.faults == []
    assert {one.id: one.source.model.max_model_len for one in manager.engines} == {
        model_id: one.model.max_model_len for model_id, one in wanted.models.items()
    }
    serving = [manager.serving(model_id) for model_id in wanted.models]
    alive = [engine for engine in house.engines if engine.state in (ClientState.STARTING, ClientState.READY)]
    assert {id(engine) for engine in alive} <= {id(one.client) for one in serving if one is not None}
    default = manager.default
    assert (default is None) == (not wanted.models)
    if wanted.default is not None and (chosen := manager.serving(wanted.default)) is not None and chosen.serves:
        assert default is chosen
