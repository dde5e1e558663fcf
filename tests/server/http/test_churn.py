"""Edits of the registry while clients stream: none of them notices. Real engines: `benchmarks/churn.py`."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from tests.support.fake_engine import REPLY
from tests.support.http_server import Site, running_server
from tests.support.waiting import until

NUM_CLIENTS = 6
BROKEN = ("models: [{id: a, pa", "models: [{id: a, path: stub}, {id: a, path: stub}]", "models: [{id: a, path: /none}]")


def edits() -> Iterator[tuple[str, bool]]:
    """Yields what the file says, and whether it is fit. `a` is always there, and is another one in every round."""
    for number in itertools.count(1):
        a = f"{{id: a, path: stub, max_model_len: {100 + number}}}"
        yield f"models: [{a}, {{id: b, path: stub}}]", True
        yield f"models: [{a}, {{id: b, path: stub, default: true}}]", True
        yield BROKEN[number % len(BROKEN)], False
        yield f"models: [{a}]", True


@contextlib.asynccontextmanager
async def following(site: Site) -> AsyncIterator[None]:
    task = asyncio.create_task(site.models.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def edit(site: Site, path: Path, text: str, fit: bool) -> None:
    """Writes the file and waits until the registry has said what it makes of it."""
    event = "registry_applied" if fit else "registry_refused"
    before = sum(one.event == event for one in site.models.events.latest)
    path.write_text(text, encoding="utf-8")
    await until(lambda: sum(one.event == event for one in site.models.events.latest) != before)


async def client(site: Site, model_id: str | None, stop: asyncio.Event, answers: list[str]) -> None:
    body = {"prompt": "Hi", "max_tokens": 90} | ({"model": model_id} if model_id else {})
    while not stop.is_set():
        events: list[Any] = await site.events("/v1/completions", body)
        assert events[-1] == "[DONE]", events[-1]
        answers.append("".join(event["choices"][0]["text"] for event in events[:-1]))


async def test_no_request_fails_while_the_registry_is_edited(tmp_path: Path):
    path = tmp_path / "registry.yaml"
    path.write_text("models: [{id: a, path: stub}]", encoding="utf-8")
    tree = {"auth": {"allow_anonymous": True}, "registry": {"path": str(path), "poll_interval_ms": 50}}
    stop, answers = asyncio.Event(), []
    async with running_server(tree) as site, following(site), asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            group.create_task(client(site, "a" if number % 2 else None, stop, answers))
        for text, fit in itertools.islice(edits(), 12):
            await edit(site, path, text, fit)
            assert site.models.registry is not None
            assert (site.models.registry.status.state == "ok") is fit
            assert sum(backend.id == "a" for backend in site.backends.engines) <= 2
        stop.set()
    assert len(answers) >= 12
    assert set(answers) == {REPLY}
    assert not site.backends.engines or [one.id for one in site.backends.engines] == ["a"]
