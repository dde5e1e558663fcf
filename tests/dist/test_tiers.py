"""Ranks with lower tiers: every rank moves its own shard, and they say what one process without tiers says."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.models import TinyModel
from tests.support.tier_workload import assert_same, make_workload, play_on_ranks, run, start, states_around
from tests.support.world import World


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
def test_two_ranks_with_tiers_say_what_one_process_says(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path, overlap: bool
):
    folder, scripts = tiny_model("llama").folder, make_workload(3, 24)
    expected = run(start(folder, "float32", paged_kv={"device_pages": 440}), scripts)
    tiers = {
        "paged_kv": {"device_pages": 44, "cpu_pages": 12},
        "nvme_offload": {"path": str(tmp_path / "kv"), "max_gb": 0.02, "queue_depth": 16},
    }
    with World(2) as world:
        said, stats = world.run(play_on_ranks, folder, tiers, scripts, overlap)
    assert_same(said, expected * 2, "float32")
    assert stats["cpu"].hit_tokens > 0
    assert stats["nvme"].hit_tokens > 0
    assert stats["nvme"].damaged_pages == 0


def test_the_file_is_off_while_another_ranks_is(tiny_model: Callable[[str], TinyModel], tmp_path: Path):
    """Rank 1's file lies where there is no folder yet."""
    tiers = {"nvme_offload": {"path": str(tmp_path / "kv"), "max_gb": 0.02, "queue_depth": 16}}
    (tmp_path / "kv.1").symlink_to(tmp_path / "later" / "kv")
    with World(2) as world:
        states = world.run(states_around, tiny_model("llama").folder, tiers, partial(Path.mkdir, tmp_path / "later"))
    assert states == ["off", "on"]
