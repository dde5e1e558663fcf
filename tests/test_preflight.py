"""`inferflux config check --preflight` finds what would keep a server from starting, before the running one is stopped
for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferflux.cli import main
from tests.support.programs import ROOT

KEYS = "auth: {api_keys: [{key: sk-0123456789abcdef}]}\n"
KERNELS = "def nrm(x, weight, eps):\n    return x\n"
SLOW_NORM = "def norm(x, weight):\n    return x\n"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(llama_folder)
    Path("misnamed.py").write_text(KERNELS)
    Path("short.py").write_text(SLOW_NORM)
    return tmp_path


def _check(text: str, *arguments: str) -> int:
    Path("c.yaml").write_text(KEYS + text)
    return main(["config", "check", *arguments, "c.yaml"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "runtime: {kernels: {norm: tritn}}",
            "runtime.kernels.norm: no kernels called 'tritn'; accepted: auto, triton",
        ),
        ("runtime: {kernels: {rope: none.py}}", "runtime.kernels.rope: kernels 'none.py' cannot be imported: FileNot"),
        ("runtime: {kernels: {rope: no.such}}", "runtime.kernels.rope: kernels 'no.such' cannot be imported: ModuleNo"),
        ("runtime: {kernels: {norm: misnamed.py}}", "runtime.kernels.norm: misnamed.py cannot serve norm in "),
        ("runtime: {kernels: {norm: short.py}}", "runtime.kernels.norm: short.py cannot serve norm in "),
        ("runtime: {allow_stub: false}", "models: at least one is needed"),
        (
            "runtime: {allow_stub: false}\nmodels: [{id: a, path: none}]",
            "models: a: none is not a folder, and runtime.allow_stub is false",
        ),
        ("models: [{id: a, path: stub, chat_template: none}]", "models[].chat_template: none: cannot be read: No such"),
        (
            "models: [{id: a, path: model, max_model_len: 99999999}]",
            "models[].max_model_len: must be >= 1 and <= 1024, what the model is made for (got 99999999)",
        ),
        ("models: [{id: a, path: model}]\nadapters: [{id: b, path: x, base: a}]", "adapters[0].path: must be a folder"),
        ("runtime: {paged_kv: {dtype: float16}}", "runtime.paged_kv.dtype: must be auto, int8, fp8 or the model's"),
        (
            "runtime: {speculative_decoding: {enabled: true, draft_model: none}}",
            "runtime.speculative_decoding.draft_model: must be a model folder (got none, which is none)",
        ),
        ("policy: {store: none/file}", "policy.store: none/file: must be in a folder (got none, which is none)"),
        ("logging: {audit_log: none/file}", "logging.audit_log: none/file: must be in a folder (got none, which is"),
        (
            "server: {tls: {enabled: true, cert_path: none.pem, key_path: key.pem}}",
            "server.tls.cert_path: none.pem: there is no such file",
        ),
    ],
)
def test_what_a_server_would_refuse_is_told_with_file_and_key(
    folder: Path, text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check(text, "--preflight") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"c.yaml: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "runtime: {kernels: {norm: misnamed.py}}",
        "runtime: {allow_stub: false}\nmodels: [{id: a, path: none}]",
        "server: {tls: {enabled: true, cert_path: none.pem, key_path: key.pem}}",
    ],
)
def test_the_server_says_the_same(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _check(text, "--preflight") == 2
    command = [sys.executable, "-m", "inferflux", "serve", "--config", "c.yaml", "--port", "0"]
    served = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
    )
    assert served.returncode == 2
    assert served.stderr.splitlines()[-1] == capsys.readouterr().err.rstrip("\n")


def test_a_sound_configuration_passes_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The policy store and the audit log are the server's to make."""
    kernels = "runtime: {kernels: {norm: reference, rope: torch}}"
    assert _check(f"{kernels}\npolicy: {{store: policy.enc}}\nlogging: {{audit_log: audit.log}}", "--preflight") == 0
    assert capsys.readouterr() == ("c.yaml: ok\n", "")
    assert {path.name for path in folder.iterdir()} == {"c.yaml", "misnamed.py", "model", "short.py"}


def test_a_model_that_the_demo_model_would_stand_in_for_is_noted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check("models: [{id: a, path: none}]", "--preflight") == 0
    assert capsys.readouterr().err == (
        "note: models: a: none is not a folder: the demo model would answer in its place\n"
    )


def test_the_file_alone_is_checked_where_the_server_does_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "runtime: {kernels: {norm: on_the_server.py}}\nmodels: [{id: a, path: none, backend: cuda}]"
    assert _check(text, "--preflight") == 2
    capsys.readouterr()
    assert _check(text) == 0
    assert capsys.readouterr() == ("c.yaml: ok\n", "")


def test_the_environment_counts_where_the_server_will_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keys are usually there; without one, no server starts."""
    Path("c.yaml").write_text("runtime: {allow_stub: true}\n")
    assert main(["config", "check", "--preflight", "c.yaml"]) == 2
    assert "auth.api_keys: needs at least one key" in capsys.readouterr().err
    monkeypatch.setenv("INFERFLUX_API_KEYS", "sk-0123456789abcdef")
    assert main(["config", "check", "--preflight", "c.yaml"]) == 0
    monkeypatch.setenv("INFERFLUX_RUNTIME__KERNELS__NORM", "tritn")
    assert main(["config", "check", "--preflight", "c.yaml"]) == 2
    assert "runtime.kernels.norm: no kernels called 'tritn'" in capsys.readouterr().err
