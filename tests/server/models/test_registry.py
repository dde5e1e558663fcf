"""The registry's looks, one by one, with a file, a clock and followers that do as they are told."""

import asyncio
from collections.abc import Sequence

import pytest

from inferflux.config import ModelConfig
from inferflux.errors import ConfigError, ModelLoadError
from inferflux.server.models.events import ModelEvents
from inferflux.server.models.registry import SETTLE_S, ModelRegistry
from tests.support.waiting import patience

A = "models: [{id: a, path: x}]"
B = "models: [{id: b, path: x}]"
BAD = "models: [{id: a, path: x}, {id: a, path: y}]"


class Desk:
    """A registry and everything around it. followed: what was put in force, by ids."""

    def __init__(self, text: str = A) -> None:
        self.text: str | Exception = text
        self.now = 0.0
        self.followed: list[str] = []
        self.error: Exception | None = None
        self.waits = False
        self.may_follow = asyncio.Event()
        self.may_follow.set()
        self.counted: list[str] = []
        self.events = ModelEvents(lambda _model, event, _seconds: self.counted.append(event))
        self.registry = ModelRegistry("r.yaml", self._read, self.events, interval_s=1.0, clock=lambda: self.now)

    def _read(self) -> str:
        if isinstance(self.text, Exception):
            raise self.text
        return self.text

    async def follow(self, models: Sequence[ModelConfig]) -> None:
        self.waits = not self.may_follow.is_set()
        await self.may_follow.wait()
        self.waits = False
        if self.error is not None:
            raise self.error
        self.followed.append(",".join(model.id for model in models))

    async def look(self, *, asked: bool = False) -> None:
        await self.registry.look(self.follow, asked=asked)
        attempt = self.registry._attempt
        while attempt is not None and not attempt.done() and not self.waits:
            await asyncio.sleep(0.001)

    async def write(self, text: str) -> None:
        """Writes, and lets the registry find the same twice."""
        self.text = text
        await self.look()
        await self.look()


@pytest.fixture
async def desk() -> Desk:
    desk = Desk()
    assert [model.id for model in desk.registry.first()] == ["a"]
    return desk


async def test_what_is_unchanged_is_followed_once(desk: Desk):
    for _ in range(3):
        await desk.look()
    assert desk.followed == []
    assert desk.registry.status.state == "ok"


async def test_a_change_counts_once_it_is_seen_twice(desk: Desk):
    desk.text = B[:-1]
    await desk.look()
    desk.text = "models: []  # and the writer is not done"
    await desk.look()
    desk.text = B
    await desk.look()
    assert desk.followed == []
    assert desk.registry.status.state == "ok", "what is half-written is no error yet"
    await desk.look()
    assert desk.followed == ["b"]


async def test_who_asks_need_not_wait(desk: Desk):
    desk.text = B
    await desk.look(asked=True)
    assert desk.followed == ["b"]


@pytest.mark.parametrize("text", [BAD, "", "models: [{"])
async def test_a_bad_edit_is_told_once_and_forgotten_when_it_is_gone(desk: Desk, text: str):
    await desk.write(text)
    await desk.look()
    status = desk.registry.status
    assert status.state == "error"
    assert (status.error or "").startswith("r.yaml: ")
    assert desk.counted.count("registry_refused") == 1
    assert desk.followed == []
    await desk.write(A)
    assert (desk.registry.status.state, desk.registry.status.error, desk.followed) == ("ok", None, ["a"])


async def test_a_file_that_cannot_be_read(desk: Desk):
    desk.text = ConfigError("cannot be read: no such file")
    await desk.look()
    assert desk.registry.status.error == "r.yaml: cannot be read: no such file"
    await desk.write(A)
    assert desk.registry.status.state == "ok"


async def test_what_cannot_be_put_in_force_is_tried_again_ever_more_seldom(desk: Desk):
    desk.error = ModelLoadError("b: no memory")
    await desk.write(B)
    assert desk.registry.status.error == "r.yaml: b: no memory"
    tries = []
    for second in range(130):
        desk.now = float(second)
        before = desk.registry._next_try
        await desk.look()
        if desk.registry._next_try != before:
            tries.append(second)
    assert tries == [1, 3, 7, 15, 31, 63, 123]
    desk.error = None
    await desk.look(asked=True)
    assert (desk.followed, desk.registry.status.state) == (["b"], "ok")


async def test_a_later_change_takes_the_place_of_one_under_way(desk: Desk):
    desk.may_follow.clear()
    await desk.write(B)
    assert desk.registry.status.state == "loading"
    await desk.look(asked=True)
    assert desk.registry.status.state == "loading", "what is under way is not begun again"
    await desk.write(A)
    desk.may_follow.set()
    assert desk.registry._attempt is not None
    await desk.registry._attempt
    assert desk.followed == ["a"]


async def test_another_try_that_takes_long_is_left_to_end(desk: Desk):
    """Looked at meanwhile, even on demand: a model that loads slower than the pauses would never be there."""
    desk.error = ModelLoadError("too little memory")
    await desk.write(B)
    desk.error = None
    desk.may_follow.clear()
    desk.now = 60.0
    await desk.look()
    attempt = desk.registry._attempt
    desk.now = 600.0
    await desk.look()
    await desk.look(asked=True)
    assert desk.registry._attempt is attempt
    desk.may_follow.set()
    assert attempt is not None
    await attempt
    assert desk.followed == ["b"]


async def test_a_mended_file_is_loading_and_no_longer_wrong(desk: Desk):
    """A large model takes minutes; for so long the error of the edit before would be sought in this one."""
    await desk.write(BAD)
    assert desk.registry.status.state == "error"
    desk.may_follow.clear()
    await desk.write(B)
    assert (desk.registry.status.state, desk.registry.status.error) == ("loading", None)
    desk.may_follow.set()
    await desk.look()
    assert desk.registry.status.state == "ok"


async def test_an_unfit_file_at_the_start():
    desk = Desk(BAD)
    assert desk.registry.first() == ()
    assert desk.registry.status.state == "error"
    await desk.write(A)
    assert desk.followed == ["a"]


async def test_it_runs_until_it_is_told_to_stop(desk: Desk):
    running = asyncio.create_task(desk.registry.run(desk.follow))
    desk.text = B
    async with patience():
        while not desk.followed:
            desk.registry.look_soon()
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert desk.followed == ["b"]


async def test_how_soon_it_looks_again(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """After its interval, but at once at what has just changed, to see whether the writer is done."""
    pauses: list[float] = []
    texts = iter([A, B, B, ConfigError("gone"), A])

    async def wait(seconds: float) -> bool:
        pauses.append(seconds)
        desk.text = next(texts, A)
        if len(pauses) == 6:
            await asyncio.Event().wait()
        return False

    monkeypatch.setattr(desk.registry, "_wait", wait)
    running = asyncio.create_task(desk.registry.run(desk.follow))
    async with patience():
        while len(pauses) < 6:
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert pauses == [1.0, 1.0, SETTLE_S, 1.0, 1.0, SETTLE_S]


async def test_a_change_under_way_ends_with_it(desk: Desk):
    desk.may_follow.clear()
    desk.text = B
    running = asyncio.create_task(desk.registry.run(desk.follow))
    desk.registry.look_soon()
    async with patience():
        while not desk.waits:
            await asyncio.sleep(0.001)
    attempt = desk.registry._attempt
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert attempt is not None
    assert attempt.cancelled()


async def test_who_asks_is_heard_once(desk: Desk):
    desk.registry.look_soon()
    assert await desk.registry._wait(60.0)
    assert not await desk.registry._wait(0.0)
