"""The admin route for fairness: what it answers, keeps, refuses, and tells the engines."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from inferflux.config import Config, FairnessConfig
from inferflux.server.policy.seed import runtime_in_force
from tests.support.http_server import KEY, MODEL, Site, running_server

PATH = "/v1/admin/fairness"
ADMIN = {"Authorization": f"Bearer {KEY}"}
CONFIG: dict[str, Any] = {
    "models": [{"id": MODEL, "path": "stub"}, {"id": "second", "path": "stub"}],
    "auth": {"api_keys": [{"key": KEY, "scopes": ["admin"]}]},
}
DEFAULT = {
    "policy": "priority_age",
    "enable_preemption": True,
    "high_priority_threshold": 10,
    "max_timeslice_tokens": 0,
}


async def put(site: Site, body: Any) -> tuple[int, Any]:
    async with site.session.put(site.url + PATH, json=body, headers=ADMIN) as response:
        return response.status, await response.json()


async def test_a_change_reaches_every_engine_and_keeps_what_it_does_not_name():
    async with running_server(CONFIG) as site:
        assert await site.get(PATH, headers=ADMIN) == (200, DEFAULT)
        assert await put(site, {"policy": "fair"}) == (200, {**DEFAULT, "policy": "fair"})
        expected = {**DEFAULT, "policy": "fair", "enable_preemption": False, "max_timeslice_tokens": 32}
        assert await put(site, {"enable_preemption": False, "max_timeslice_tokens": 32}) == (200, expected)
        assert await site.get(PATH, headers=ADMIN) == (200, expected)
        fairness = FairnessConfig(enable_preemption=False, max_timeslice_tokens=32)
        for engine in site.engines.values():
            assert engine.fairness == [("fair", FairnessConfig()), ("fair", fairness)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"policy": "lottery"}, "policy"),
        ({"enable_preemption": 1}, "enable_preemption"),
        ({"high_priority_threshold": "high"}, "high_priority_threshold"),
        ({"high_priority_threshold": 2**40}, "high_priority_threshold"),
        ({"max_timeslice_tokens": -1}, "max_timeslice_tokens"),
        ({"max_timeslice_tokens": 10**30}, "max_timeslice_tokens"),
        ({"polcy": "fair"}, "polcy"),
    ],
)
async def test_bad_changes_change_nothing(body: Any, param: str):
    async with running_server(CONFIG) as site:
        status, answer = await put(site, body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert (await site.get(PATH, headers=ADMIN))[1] == DEFAULT
        assert site.engine.fairness == []


async def test_what_was_set_is_in_force_after_a_restart(tmp_path: Path):
    config = {**CONFIG, "policy": {"store": str(tmp_path / "policy.json")}}
    async with running_server(config) as site:
        await put(site, {"policy": "longest_prefix", "high_priority_threshold": 3})
    async with running_server(config) as site:
        assert (await site.get(PATH, headers=ADMIN))[1]["policy"] == "longest_prefix"
        runtime = runtime_in_force(msgspec.convert(config, Config), site.policy.document)
        assert runtime.scheduler.policy == "longest_prefix"
        assert runtime.fairness == FairnessConfig(high_priority_threshold=3)
