"""Threads within a container's CPU limit: as many as it has whole CPUs, unless somebody chose another number."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inferflux.engine.runner import cpu_quota as module
from inferflux.engine.runner.cpu_quota import cpu_quota, keep_to_quota
from inferflux.llm import LLM


@pytest.fixture(autouse=True)
def eight_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_both_versions_of_control_groups_are_read(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "threads"), [("250000", 2), ("20000", 1), ("1600000", 8), ("max", 8)])
def test_threads_keep_within_the_limit_and_are_never_more(quota: str, threads: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    keep_to_quota()
    assert torch.get_num_threads() == threads


def test_a_number_that_was_chosen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    keep_to_quota()
    assert torch.get_num_threads() == 8


def test_an_engine_keeps_to_it(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    LLM("stub").close()
    assert torch.get_num_threads() == 3
