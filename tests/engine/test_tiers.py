"""A real engine with lower tiers against the same engine without: the tokens must be the same.

Random tiny weights garble the output at once when a page's bytes are not its own. Greedy choices of which the engine
without tiers was not sure (rounding depends on what else is in the batch) may differ, and are looked at no further.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferflux.engine.kv.store import page_file
from tests.support.models import TinyModel
from tests.support.tier_workload import assert_same, drain, make_workload, run, start, wait_for_file

MakeModel = Callable[[str], TinyModel]


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Device pool of a tenth of the workload's pages, a smaller host pool, the file."""
    return {
        "paged_kv": {"device_pages": 44, "cpu_pages": 40},
        "nvme_offload": {"path": str(tmp_path / "kv"), "max_gb": 0.02, "workers": 3, "queue_depth": 16},
    }


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer takes its own time, so that they end in any order."""
    rng = random.Random(5)
    read_at, write_at = page_file.read_at, page_file.write_at

    def slow_read(*args: Any) -> bool:
        time.sleep(rng.random() * 0.004)
        return read_at(*args)

    def slow_write(*args: Any) -> None:
        time.sleep(rng.random() * 0.004)
        write_at(*args)

    monkeypatch.setattr(page_file, "read_at", slow_read)
    monkeypatch.setattr(page_file, "write_at", slow_write)


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize(("dtype", "eviction", "seed"), [("float32", "lru", 1), ("bfloat16", "clock", 2)])
def test_tokens_are_those_of_an_engine_without_tiers(
    tiny_model: MakeModel, small: dict[str, Any], dtype: str, eviction: str, seed: int
):
    folder, scripts = tiny_model("llama").folder, make_workload(seed, 200)
    expected = run(start(folder, dtype, paged_kv={"device_pages": 440}), scripts)
    small["paged_kv"]["eviction"] = eviction
    engine = start(folder, dtype, **small)
    wait_for_file(engine)
    assert_same(run(engine, scripts), expected, dtype)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.tiers["cpu"].hit_tokens > 0
    assert stats.tiers["nvme"].hit_tokens > 0
    drain(engine)
    engine.check_integrity()
    engine.close()
