"""`scripts/gpu_check.sh` without a GPU: it says so; and its sections, dry-run at toy size, yield what they promise."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import attention, check, correctness, tune, whole_model
from benchmarks.gpu.bars import BARS, bars
from benchmarks.gpu.check import run_all
from inferflux.kernels.backends import KV_OPS, OPS
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workloads import workloads_of
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import dtypes_of
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_the_processes_of_a_section_that_is_cut_off_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would hold the device's memory, and be at work while the next section measures."""
    sleeper, pid = tmp_path / "sleeper.py", tmp_path / "pid"
    sleeper.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nexec {sys.executable} {sleeper}\n")
    interpreter.chmod(0o755)

    class Slow(subprocess.Popen[bytes]):
        """Its time begins once both processes are there."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                wait_until(lambda: pid.exists() and pid.read_text())
            return super().wait(timeout)

    monkeypatch.setattr(check.sys, "executable", str(interpreter))
    monkeypatch.setattr(check.subprocess, "Popen", Slow)
    assert check._run_child("decode", tmp_path, True, 1.0) == "stopped after 1 s"

    def has_ended() -> bool:
        try:
            return psutil.Process(int(pid.read_text())).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(has_ended)


def test_every_case_is_checked_some_at_a_time_and_what_is_known_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of an op's cases in one process took longer than the section has; those cut off are then few, and counted."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, most: int, mp_context: object) -> None:
            super().__init__(2)

    def play(part: correctness._Part, device: str) -> dict[str, Any]:
        if part.op == "norm" and part.first:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        cases = cases_of(part.op, quantized_kv=part.quantized)[part.first : part.first + correctness.CASES_AT_ONCE]
        return {"ok": True, "backend": "triton", "cases": len(cases), "largest_error": part.first / 1e6, "problems": []}

    monkeypatch.setattr(correctness, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(correctness, "_check", play)
    told = list(correctness.kernels(CPU, False))
    last = dict(told)
    for op in OPS:
        for dtype in dtypes_of(op):
            for quantized in (False, True) if op in KV_OPS else (False,):
                name = f"{op} {str(dtype)[6:]}" + ", 8-bit pages" * quantized
                figures, count = last.pop(name), len(cases_of(op, quantized_kv=quantized))
                assert figures["of"] == count
                assert figures["ok"] == (op != "norm")
                if op == "norm":
                    assert figures["cases"] == correctness.CASES_AT_ONCE
                    assert "illegal memory access" in figures["problems"][0]
                else:
                    assert figures["cases"] == count
    assert not last
    counts = [figures["cases"] for name, figures in told if name == "attention float32"]
    assert counts == sorted(counts)
    assert len(counts) > 10
