"""`inferflux kernels`: what it prints and how it exits. What the checks find is tested beside `check`."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from inferflux.cli import main
from inferflux.kernels import backends, native
from inferflux.kernels.backends import OPS
from inferflux.kernels.kernel_set import select

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


def test_list_says_what_serves_for_pages_of_8_bits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "QUANTIZED_KV", False)
    asked = ["list", "--device", "cpu", "--dtype", "float32"]
    assert main(["kernels", *asked]) == 0
    assert "attention on 8-bit pages" in capsys.readouterr().out
    assert main(["kernels", *asked, "--json"]) == 0
    quantized = {
        row["op"]: row["quantized_kv"] for row in json.loads(capsys.readouterr().out)["ops"] if "quantized_kv" in row
    }
    assert quantized.keys() == {"attention", "rope"}
    choices = select(torch.device("cpu"), torch.float32, quantized_kv=True).choices
    assert {op: row["selected"] for op, row in quantized.items()} == {
        choice.op: choice.backend for choice in choices if choice.op in quantized
    }
    assert quantized["rope"]["backends"]["native"] == "refused: it does not support keys and values of 8 bits"


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


def test_an_op_asked_for_that_is_not_there_is_not_passed_over(
    wrong_norm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--op", "norm", "--op", "attention", "--dtype", "float32"]
    assert main(["kernels", "check", "--module", wrong_norm, *asked]) == 1
    assert f"not checked: {wrong_norm} attention: it has no attention" in capsys.readouterr().out


def test_every_module_named_is_checked(wrong_norm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.py"
    other.write_text("def activation(gate_up, kind):\n    return gate_up\n")
    named = ["check", "--module", wrong_norm, "--module", str(other), "--dtype", "float32"]
    code, results = run_json(capsys, *named)
    assert code == 1
    assert {(row["backend"], row["op"]) for row in results} == {(wrong_norm, "norm"), (str(other), "activation")}
    other.write_text("def activaton(gate_up, kind):\n    return gate_up\n")
    assert main(["kernels", *named]) == 2
    assert "it has no activation, unless its activaton is meant (activation)" in capsys.readouterr().err


def test_what_fails_alike_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.py"
    path.write_text("def norm(x, weight): ...")
    assert main(["kernels", "check", "--module", str(path), "--dtype", "float32"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "TypeError" in line]
    assert len(told) == 1
    assert "1x576 and " in told[0]
    assert told[0].endswith("(the op is norm(x, weight, eps), see inferflux/kernels/ops.py)")
    path.write_text("class linear:\n    def pack(weight): ...\n    def run(packed, x): ...\n")
    assert main(["kernels", "check", "--module", str(path), "--dtype", "float32"]) == 1
    assert "(the op is linear.pack(weight, bias), linear.run(packed, x), see " in capsys.readouterr().out


def test_the_table_keeps_its_words_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["--backend", "reference", "--op", "rope", "--dtype", "bfloat16"]
    assert main(["kernels", "check", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.split()[:6] == ["reference", "rope", "on", "8-bit", "pages", "bfloat16"] for line in lines)


QUANTIZED_ROPE = """
from inferflux.kernels.quantized_kv import is_quantized
from inferflux.kernels.reference.rope import rope as true_rope

def rope(qkv, cos, sin, kv_pages, slots, *, num_heads):
    query = true_rope(qkv, cos, sin, kv_pages, slots, num_heads=num_heads)
    if is_quantized(kv_pages):
        kv_pages[..., -1] = 0  # the top of a scale
    return query
"""


def test_pages_of_8_bits_are_checked_where_a_file_says_that_it_knows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quantized.py"
    path.write_text(QUANTIZED_ROPE)
    asked = ["check", "--module", str(path), "--op", "rope", "--dtype", "float32"]
    assert main(["kernels", *asked]) == 0
    assert "rope: it does not support keys and values of 8 bits" in capsys.readouterr().out
    path.write_text(QUANTIZED_ROPE + "QUANTIZED_KV = True")
    assert main(["kernels", *asked]) == 1
    text = capsys.readouterr().out
    assert "rope on 8-bit pages" in text
    assert f"{path} rope float32, int8 pages, mixed: error" in text
    code, results = run_json(capsys, *asked)
    assert code == 1
    assert {bool(row["ok"]) for row in results if "pages," in str(row["case"])} == {False}
    assert {bool(row["ok"]) for row in results if "pages," not in str(row["case"])} == {True}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def supports(op): ...", "its supports() failed: TypeError: supports() takes 1 positional argument"),
        ("def supports(op, device, dtype): return True", "its supports() returned True, neither a reason nor None ("),
        ("class linear:\n    def run(packed, x): ...", "its linear has no pack (linear)"),
        ("import sys; sys.exit(7)", "cannot be imported: SystemExit: 7"),
        ("def linear(x, weight, bias): ...", "its linear has no pack and no run (linear)"),
        ("def rms_norm(x, weight, eps): ...", "it has no norm, unless its rms_norm is meant (norm)"),
        (
            "import os\n\nos.getenv('NVCC').strip()",
            "AttributeError: 'NoneType' object has no attribute 'strip' (odd.py, line 3)",
        ),
        (
            "import my_helper",
            "No module named 'my_helper' (odd.py, line 1) (modules are found if their package",
        ),
    ],
)
def test_a_file_that_is_wrong_in_its_form_exits_2(
    source: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.py"
    path.write_text(source)
    assert main(["kernels", "check", "--module", str(path)]) == 2
    assert reason in capsys.readouterr().err


def test_a_broken_file_of_a_package_is_that_ops_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "half_broken"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "norm.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["kernels", "check", "--backend", "half_broken", "--op", "norm"]) == 2
    assert "cannot be imported: ZeroDivisionError: division by zero (norm.py, line 1) (norm)" in capsys.readouterr().err


def test_list_survives_another_packages_broken_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = importlib.metadata.EntryPoints(
        [importlib.metadata.EntryPoint("fast", "no_such_package.kernels", backends.ENTRY_POINT_GROUP)]
    )
    monkeypatch.setattr(backends, "entry_points", lambda group: points)
    assert main(["kernels", "list", "--device", "cpu", "--json"]) == 0
    norm = next(row for row in json.loads(capsys.readouterr().out)["ops"] if row["op"] == "norm")
    assert norm["backends"]["fast"].startswith("refused: kernels 'fast' cannot be imported: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backend", "tritn"], "no kernels called 'tritn'; accepted: triton, native, torch, reference"),
        (["--module", "missing.py"], "'missing.py' cannot be imported"),
        (["--module", "json"], "nothing to check: json: it has no attention, linear, "),
    ],
)
def test_usage_errors_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "check", *argv]) == 2
    assert message in capsys.readouterr().err
