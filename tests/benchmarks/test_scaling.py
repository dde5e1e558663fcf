"""The scaling model: its parts add up, and measured collectives give back the link they were made with."""

import json
from pathlib import Path

import pytest

from benchmarks.scaling import BETWEEN_HOSTS, INSIDE_A_HOST, SHAPES, Gpu, Link, Load, fits, fitted, predict, step_s

LINKS = (INSIDE_A_HOST, BETWEEN_HOSTS)
LOAD = Load(rows=64, context=4096, plan_s=150e-6)
LLAMA, QWEN = SHAPES


def test_one_rank_only_reads_its_weights_and_pages() -> None:
    """70.0 billion parameters less the input embedding, and 64 x 4096 tokens of 320 KiB."""
    endless = Gpu(bytes_per_s=1e12, flops=1e30)
    assert step_s(LLAMA, 1, LOAD, LINKS, endless) == pytest.approx((139.0e9 + 64 * 4096 * 327680) / 1e12, rel=0.01)
    assert not fits(LLAMA, 1, LOAD, Gpu())


def test_without_links_to_wait_for_ranks_share_evenly() -> None:
    free = (Link(0.0, 1e30),) * 2
    load = Load(64, 4096, 0.0)
    assert step_s(LLAMA, 8, load, free, Gpu()) == pytest.approx(step_s(LLAMA, 1, load, free, Gpu()) / 8)
    # Its four key/value heads do not divide among eight ranks: twice the pages on each.
    assert step_s(QWEN, 8, load, free, Gpu()) > step_s(QWEN, 1, load, free, Gpu()) / 8


def test_replicas_multiply_what_one_group_does() -> None:
    (alone,) = [way for way in predict(LLAMA, 8, LOAD, LINKS, Gpu()) if way[0] == 8]
    (four,) = [way for way in predict(LLAMA, 32, LOAD, LINKS, Gpu()) if way[0] == 8]
    assert four[:2] == (8, 4)
    assert four[3] == pytest.approx(4 * alone[3])


def test_measured_collectives_give_back_the_link(tmp_path: Path) -> None:
    link = Link(50e-6, 2e9)
    measured = [
        {"collective": "all_reduce", "bytes": size, "us": link.all_reduce(size, 4) * 1e6} for size in (8192, 4194304)
    ]
    path = tmp_path / "collectives.json"
    path.write_text(json.dumps({"ranks": 4, "collectives": measured}))
    assert fitted(path).latency_s == pytest.approx(link.latency_s)
    assert fitted(path).bytes_per_s == pytest.approx(link.bytes_per_s)
