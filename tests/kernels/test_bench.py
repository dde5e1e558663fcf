"""`inferflux kernels bench`: what it counts, compares and writes. Of the times, only that they are times."""

import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from inferflux.cli import main
from inferflux.kernels.backends import OPS
from inferflux.kernels.bench import command
from inferflux.kernels.bench.measure import Contender, Sampler, make_contender, take_turns
from inferflux.kernels.bench.report import make_entry, make_pairs
from inferflux.kernels.bench.roofline import TOY_PROBE, Roofline
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import workloads_of

CPU = torch.device("cpu")
ROOF = Roofline(1e9, {torch.float32: 1e12})

MY_NORM = """
import torch


def norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
"""


def run(out: Path, *argv: str) -> int:
    return main(["kernels", "bench", "--size", "toy", "--rounds", "3", "--out", str(out), "--device", "cpu", *argv])


def named(op: str, name: str) -> Workload:
    return next(workload for workload in workloads_of(op, SHAPES["small"]) if workload.name == name)


def test_a_sample_is_the_time_of_one_call() -> None:
    """All that holds on any machine: a call takes at least as long as it sleeps, and not a clock's reading."""
    contender = Contender("sleeps", lambda: time.sleep(0.01), lambda: None)
    begin = time.perf_counter()
    assert 0.01 <= Sampler(CPU, flush=None).seconds(contender, 3) <= time.perf_counter() - begin


def test_a_strangers_file_runs_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tmp_path / "mine.py"
    module.write_text(MY_NORM)
    assert run(tmp_path / "out", "--op", "norm", "--backend", "torch", "--module", str(module)) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {entry["backend"] for entry in report["entries"]} == {"torch", str(module)}
    assert {(pair["first"], pair["second"]) for pair in report["pairs"]} == {("torch", str(module))}
    assert all(entry["percent"] > 0 and entry["gb_per_s"] > 0 for entry in report["entries"])
    assert report["roofline"]["gb_per_s"] > 0
    assert "written: " in capsys.readouterr().out


def test_every_op_writes_csv_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run(tmp_path, "--json") == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    with (tmp_path / "bench.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["workload"] for row in rows] == [entry["workload"] for entry in entries]
    assert {row["op"] for row in rows} == set(OPS)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tmp_path, "--op", "activation") == 0
    assert "pip install 'inferflux[bench]'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bench.csv", "bench.json"}


def test_a_kernel_that_fails_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "broken.py"
    module.write_text("def norm(x, weight, eps):\n    raise RuntimeError('out of registers')\n")
    assert run(tmp_path / "out", "--op", "norm", "--backend", "torch", "--module", str(module)) == 1
    assert f"{module} norm 1x64 float32: RuntimeError: out of registers (broken.py, line 2)" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {entry["backend"] for entry in report["entries"]} == {"torch"}


def test_a_kernel_that_fails_later_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tmp_path / "tired.py"
    module.write_text(
        "calls = []\n\ndef norm(x, weight, eps):\n    calls.append(x)\n"
        "    assert len(calls) < 5, 'tired'\n    return x\n"
    )
    assert run(tmp_path / "out", "--op", "norm", "--backend", "torch", "--module", str(module)) == 1
    assert f"{module} norm 1x64 float32: AssertionError: tired" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {entry["backend"] for entry in report["entries"]} == {"torch"}


def test_a_kernel_that_computes_wrongly_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "probe_for", lambda _device: TOY_PROBE)
    module = tmp_path / "wrong.py"
    module.write_text("def norm(x, weight, eps):\n    return x * weight\n")
    asked = ["--op", "norm", "--backend", "torch", "--module", str(module)]
    assert run(tmp_path / "out", *asked, "--size", "small", "--rounds", "1") == 1
    assert f"{module} norm float32: not timed, as it fails its check: " in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {entry["backend"] for entry in report["entries"]} == {"torch"}


def test_where_nothing_could_be_measured_there_is_no_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tmp_path / "broken.py"
    module.write_text("def norm(x, weight, eps):\n    raise RuntimeError('out of registers')\n")
    assert run(tmp_path / "out", "--op", "norm", "--backend", str(module)) == 1
    assert "no roofline plot: nothing was measured" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file", "--op", "norm") == 2
    assert "--out: " in capsys.readouterr().err


def test_a_module_that_serves_nothing_of_what_is_asked_is_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "misspelt.py"
    module.write_text("def nrom(x, weight, eps):\n    return x\n")
    assert run(tmp_path / "out", "--op", "norm", "--backend", "torch", "--module", str(module)) == 2
    assert f"nothing to measure: {module}: it has no norm, unless its nrom is meant" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_takes_no_figures_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench.csv").symlink_to("/dev/full")
    assert run(tmp_path, "--op", "norm", "--backend", "torch") == 1
    told = capsys.readouterr()
    assert "norm 1x64" in told.out
    assert told.err.strip().endswith(f"--out: {tmp_path} cannot be written: No space left on device")


def test_half_a_backends_name_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    Path("my_own_very_fast_norm.py").write_text(MY_NORM)
    assert run(tmp_path, "--op", "norm", "--backend", "torch", "--module", "my_own_very_fast_norm.py") == 0
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backend", "tocrh"], 'did you mean "torch"'),
        (["--backend", "torch", "--op", "nrom"], 'did you mean "norm"'),
        (["--rounds", "0"], "must be >= 1"),
        (["--rounds", "x"], "argument --rounds: must be a whole number (got 'x')"),
        (["--module", "json", "--backend", "json"], "nothing to measure"),
    ],
)
def test_usage_errors_exit_2(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = run(tmp_path, *argv)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


def test_costs_are_what_an_op_cannot_do_without() -> None:
    """Counted by hand: Llama-like heads (9, 3, 64), 32 rows of 512 cached tokens; a [3072, 576] matrix, one row."""
    decode = named("attention", "decode 32x512").cost
    assert decode.num_bytes(torch.float32) == 4 * (32 * 512 * 2 * 3 * 64 + 2 * 32 * 9 * 64)
    assert decode.flops == 4 * 32 * 512 * 9 * 64
    assert named("attention", "prefill 512").cost.flops == 4 * (512 * 513 // 2) * 9 * 64
    product = named("linear", "gate_up 1").cost
    assert product.num_bytes(torch.bfloat16) == 2 * (3072 * 576 + 3072 + 576)
    assert product.flops == 2 * 3072 * 576


def test_percent_and_bound_come_from_the_nearer_limit() -> None:
    workload = named("linear", "gate_up 1")
    entry = make_entry(workload, torch.float32, "x", [0.03, 0.01, 0.02], ROOF)
    assert entry.seconds == 0.02
    assert entry.best_seconds == 0.01
    assert entry.bound == "memory"
    assert entry.percent == pytest.approx(100 * workload.cost.num_bytes(torch.float32) / 1e9 / 0.02)
    slow_alu = Roofline(1e9, {torch.float32: 1e6})
    assert make_entry(workload, torch.float32, "x", [1.0], slow_alu).bound == "compute"


def test_pairs_compare_rounds_and_not_averages() -> None:
    """The machine halved its speed for one round: both were met, and the ratio is not moved."""
    times = {"a": [1.0, 2.0, 1.0], "b": [3.0, 6.0, 3.0]}
    (pair,) = make_pairs(named("norm", "1x576"), torch.float32, times)
    assert (pair.first, pair.second, pair.speedup, pair.low, pair.high) == ("a", "b", 3.0, 3.0, 3.0)


def test_quartiles_of_two_rounds_lie_between_them() -> None:
    times = {"a": [1.0, 1.0], "b": [1.0, 9.0]}
    (pair,) = make_pairs(named("norm", "1x576"), torch.float32, times)
    assert 1.0 <= pair.low <= pair.speedup <= pair.high <= 9.0


def test_rounds_alternate_who_goes_first() -> None:
    calls: list[str] = []
    contenders = [Contender(name, lambda name=name: calls.append(name), lambda: None) for name in "ab"]
    times = take_turns(contenders, Sampler(CPU, flush=lambda: None), rounds=3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [len(own) for own in times] == [3, 3]


def test_what_an_op_overwrites_is_put_back() -> None:
    workload = workloads_of("add_norm", SHAPES["toy"])[0]
    seen: list[float] = []

    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        seen.append(float(residual.sum()))
        residual.zero_()

    contender = make_contender("x", add_norm, workload, torch.float32, CPU)
    contender.restore()
    contender.call()
    assert seen[0] == seen[1] != 0
