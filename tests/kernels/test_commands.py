"""`inferflux kernels`: what it prints and how it exits. What the checks find is tested beside `check`."""

import json
from pathlib import Path

import pytest

from inferflux.cli import main
from inferflux.kernels.backends import OPS

WRONG_NORM = "def norm(x, weight, eps):\n    return x * weight\n"


@pytest.fixture
def wrong_norm(tmp_path: Path) -> str:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG_NORM)
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[dict[str, object]]]:
    code = main(["kernels", *argv, "--json"])
    result = json.loads(capsys.readouterr().out)
    return code, result


def test_list_names_every_op_and_what_serves_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in OPS)
    assert "selected" in text


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list", "--device", "cpu", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert listing["device"] == "cpu"
    assert [row["op"] for row in listing["ops"]] == list(OPS)
    assert {row["backends"][row["selected"]] for row in listing["ops"]} == {"selected"}


def test_check_passes_for_what_is_built_in(capsys: pytest.CaptureFixture[str]) -> None:
    code, results = run_json(capsys, "check", "--op", "activation", "--op", "rope", "--dtype", "float32")
    assert code == 0
    checked = {(row["backend"], row["op"], row["dtype"]) for row in results}
    assert {("torch", "activation", "float32"), ("torch", "rope", "float32")} <= checked
    assert {backend for backend, _, _ in checked} <= {"native", "torch"}
    assert all(row["ok"] for row in results)


def test_check_of_a_wrong_file_fails_and_says_where(wrong_norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "check", "--module", wrong_norm, "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert "failed" in text
    assert "norm float32, per head" in text


def test_check_covers_only_what_the_file_has(wrong_norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = run_json(capsys, "check", "--module", wrong_norm)
    assert code == 1
    assert {row["op"] for row in results} == {"norm"}
    assert {row["dtype"] for row in results} == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backend", "tritn"], "no kernels called 'tritn'; accepted: triton, native, torch, reference"),
        (["--module", "missing.py"], "'missing.py' cannot be imported"),
        (["--module", "json"], "nothing to check: json: activation: it has no activation"),
    ],
)
def test_usage_errors_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "check", *argv]) == 2
    assert message in capsys.readouterr().err
