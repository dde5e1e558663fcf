"""`scripts/gpu_check.sh` without a GPU: it says so; and its sections, dry-run at toy size, yield what they promise."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import attention, check, correctness, tune, whole_model
from benchmarks.gpu.bars import BARS, bars
from benchmarks.gpu.check import run_all
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workloads import workloads_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", "--out", str(tmp_path)],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (whole_model.decode, {"graphs on", "graphs on, shipped sizes", "graphs off"}),
        (whole_model.workload, {"inferflux, 4 requests", "inferflux, 1 requests"}),
        (whole_model.rival, {"transformers"}),
        (attention.measure, {"roofline", "decode 3x40", "prefill 24 after 8"}),
        (tune.measure, {"table"}),
        (correctness.collectives, {"group", "results", "a model in the group"}),
    ],
)
def test_a_section_yields_its_figures(
    section: Callable[[torch.device, bool], Iterator[tuple[str, Any]]], names: set[str]
) -> None:
    figures = dict(section(CPU, True))
    assert figures.keys() == names
    assert json.loads(json.dumps(figures)) == figures


def test_the_bars_are_tuned_for_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task with few candidates is ready before them, and keeps them from the device while it takes its times."""
    pytest.importorskip("triton")
    from inferflux.kernels.triton.size_table import SizeTable
    from inferflux.kernels.triton.sizes import Sizes
    from inferflux.kernels.tune.knobs import TuningTask, tasks_of
    from inferflux.kernels.tune.report import Found

    tuned: list[list[str]] = []

    def play(tasks: list[TuningTask], model_size: str, seconds: float, _: object) -> Found:
        assert 0 < seconds <= tune.SECONDS
        tuned.append([task.name for task in tasks])
        return Found(SizeTable(2, "a GPU", "3", "2026-11-27", model_size, Sizes()), {})

    monkeypatch.setattr(tune, "demand_gpu", lambda: None)
    monkeypatch.setattr(tune, "tune", play)
    assert dict(tune.measure(torch.device("cuda"), False))["table"]["ok"] is False
    first, others = tuned
    assert first == list(tune.FIRST)
    assert sorted(first + others) == sorted(task.name for task in tasks_of(SHAPES["large"]))


def test_the_bars_stand_beside_each_other_with_measured_and_with_shipped_sizes() -> None:
    ways = {"graphs on": 4.0, "graphs on, shipped sizes": 5.0}
    decode = {way: {"share_of_roofline": 3.5 / ms, "ms_per_token": ms, "recorded": True} for way, ms in ways.items()}
    attention = {"decode 1x65536": {"us": 70.0, "us_with_shipped_sizes": 84.0, "share_of_copy": 0.9, "gb_per_s": 1.0}}
    sections = {"decode": {"figures": decode}, "attention": {"figures": attention}, "tune": {"figures": {}}}
    found = bars(sections)
    assert [each["reached_by"] for each in found.values()] == [["tuned"], ["tuned"]]
    one_row, whole = found.values()
    assert one_row["shipped"] == {"share_of_copy": pytest.approx(0.75), "us": 84.0}
    assert (whole["tuned"]["ms_per_token"], whole["shipped"]["share_of_roofline"]) == (4.0, pytest.approx(0.7))
    assert bars({}) == {}
    # Cut off before the other, or measured on another backend.
    del decode["graphs on, shipped sizes"], attention["decode 1x65536"]["us_with_shipped_sizes"]
    assert [each["shipped"] for each in bars(sections).values()] == [None, None]


def test_the_bars_are_of_workloads_that_are_measured() -> None:
    attention_names = {each.name for each in workloads_of("attention", SHAPES["large"])}
    assert {bar.figures for bar in BARS.values() if bar.section == "attention"} <= attention_names


def test_a_section_that_fails_keeps_its_figures_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child process is played: one ends well, one writes a figure and is cut off."""

    def child(name: str, out: Path, toy: bool, limit: float) -> str:
        (out / f"{name}.json").write_text(json.dumps({"first": {"ok": True}}))
        return "ok" if name == "kernels" else "stopped after 1 s"

    monkeypatch.setattr(check, "_run_child", child)
    assert run_all(["decode", "kernels"], tmp_path, toy=True) == 1
    sections = json.loads((tmp_path / "gpu_check.json").read_text())["sections"]
    assert {name: section["status"] for name, section in sections.items()} == {
        "decode": "stopped after 1 s",
        "kernels": "ok",
    }
    assert sections["decode"]["figures"] == {"first": {"ok": True}}
    assert run_all(["kernels"], tmp_path, toy=True) == 0
