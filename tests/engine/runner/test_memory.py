"""Sizing the pool: what fits, what is refused, and what the message tells the user to change."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import PagedKvConfig, SchedulerConfig
from inferflux.engine.runner.memory import FreeMemory, PoolPlan, _cgroup_available, free_memory, plan_cache, plan_pool
from inferflux.errors import ConfigError, ModelLoadError

MIB = 2**20


def plan(window: int, free_mib: float, *, asked: int | None = None, kind: str = "cpu", **paged_kv: Any) -> PoolPlan:
    """Pages of 16 tokens and 1 MiB, two requests at once."""
    runtime = RuntimeConfig(paged_kv=PagedKvConfig(**paged_kv), scheduler=SchedulerConfig(max_batch_size=2))
    model = ModelConfig(id="m", path="x", max_model_len=asked)
    return plan_pool(model, runtime, window, MIB, FreeMemory(kind, int(free_mib * MIB)))


def test_plenty_of_memory_is_not_taken_beyond_use():
    assert plan(1024, 100_000) == PoolPlan(2 * 64 + 1, 1024)


@pytest.mark.parametrize(("kind", "pages"), [("cpu", 100), ("cuda", 360)])
def test_the_default_share_depends_on_the_device(kind: str, pages: int):
    assert plan(16 * 1000, 400, kind=kind).num_pages == pages


def test_the_share_can_be_set():
    assert plan(16 * 1000, 400, device_memory_fraction=0.5).num_pages == 200


def test_the_models_own_window_shrinks_with_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert plan(8192, 400) == PoolPlan(100, 1600)
    assert "1600, not 8192" in caplog.text


def test_a_window_that_was_asked_for_does_not_shrink():
    with pytest.raises(ConfigError, match=r"max_model_len: 8192 tokens need 512 KV pages .* at most 1600"):
        plan(8192, 400, asked=8192)
    assert plan(1600, 400, asked=1600) == PoolPlan(100, 1600)


def test_too_little_for_any_use_says_how_much_is_missing():
    with pytest.raises(ModelLoadError, match=r"holds 64 tokens; 12 MiB more are needed"):
        plan(8192, 16)


def test_a_short_window_needs_no_more_than_itself():
    assert plan(40, 13).num_pages == 3


def test_a_fixed_number_of_pages_is_taken_at_its_word():
    assert plan(8192, 100_000, device_pages=3) == PoolPlan(3, 48)
    assert plan(16, 100_000, device_pages=500).num_pages == 500
    with pytest.raises(ConfigError, match=r"device_pages: 500 pages .* at most 400"):
        plan(16, 400, device_pages=500)


@pytest.mark.parametrize(("weight_mib", "pages"), [(10, 192), (1000, 1000)])
def test_a_cpus_prefix_cache_takes_what_the_weights_do(weight_mib: int, pages: int):
    assert cache(weight_mib, FreeMemory("cpu", 9000 * MIB)) == pages


def test_a_prefix_cache_fills_a_pool_of_a_size_that_was_asked_for():
    free = FreeMemory("cpu", 9000 * MIB)
    assert cache(10, FreeMemory("cuda", 9000 * MIB)) is None
    assert cache(10, free._replace(limit=8000 * MIB)) is None
    assert cache(10, free, device_pages=500) is None
    assert cache(10, free, device_memory_fraction=0.25) is None


def cache(weight_mib: int, free: FreeMemory, **paged_kv: Any) -> int | None:
    """Pages of 1 MiB."""
    return plan_cache(RuntimeConfig(paged_kv=PagedKvConfig(**paged_kv)), weight_mib * MIB, MIB, free)


def test_free_memory_of_this_machine_is_sane():
    free = free_memory(torch.device("cpu"))
    assert free.kind == "cpu"
    assert 0 < free.num_bytes < 2**50


def write_cgroup(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return root


def test_a_container_limit_counts_its_file_cache_as_free(tmp_path: Path):
    write_cgroup(
        tmp_path, memory_dot_max="1000\n", memory_dot_current="700\n", memory_dot_stat="anon 5\ninactive_file 200\n"
    )
    assert _cgroup_available(tmp_path) == 500


def test_an_older_control_group_is_read_too(tmp_path: Path):
    write_cgroup(
        tmp_path,
        memory__memory_dot_limit_in_bytes="900\n",
        memory__memory_dot_usage_in_bytes="300\n",
        memory__memory_dot_stat="total_inactive_file 50\n",
    )
    assert _cgroup_available(tmp_path) == 650


def test_no_limit_is_no_number(tmp_path: Path):
    assert _cgroup_available(tmp_path) is None
    write_cgroup(tmp_path, memory_dot_max="max\n", memory_dot_current="7\n", memory_dot_stat="")
    assert _cgroup_available(tmp_path) is None
