"""`inferflux config`: what it prints, where, and with which exit code. Secrets stay inside."""

import json
from pathlib import Path

import pytest

from inferflux.cli import main

KEY = "sk-0123456789abcdef"
TEXT = f"""
auth:
  api_keys: [{{key: {KEY}, name: alice}}, {{key_sha256: {"ab" * 32}}}]
server: {{cors_origins: ["https://user:hunter2@example.org"], http_port: 1}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERFLUX_PORT", "2")
    path = Path("config/server.yaml")
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def test_show_names_value_and_origin(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["server.http_port"] == {"value": 2, "origin": "INFERFLUX_PORT"}
    assert shown["server.host"] == {"value": "127.0.0.1", "origin": "default"}
    assert shown["auth.api_keys[0].name"] == {"value": "alice", "origin": str(file)}
    assert shown["auth.api_keys[0].key"]["value"] == "********"
    assert shown["auth.api_keys[1].key"]["value"] is None
    assert shown["guardrails.blocklist"]["value"] == []


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_show_masks_secrets(file: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--config", str(file), *arguments]) == 0
    out = capsys.readouterr().out
    assert "alice" in out
    for secret in (KEY, "abab", "hunter2"):
        assert secret not in out


def test_show_notes_what_it_left_out(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks why a setting does nothing looks here, not at the server's log."""
    monkeypatch.setenv("INFERFLUX_PROT", "2")
    assert main(["config", "show", "--json"]) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert 'note: INFERFLUX_PROT: unknown variable, ignored; did you mean "INFERFLUX_PORT"?\n' in shown.err


def test_show_without_keys_shows_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert main(["config", "show", "--config", str(tmp_path / "c.yaml")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("auth.api_keys"))
    assert line.split() == ["auth.api_keys", "[]", "default"]


def test_check_reads_the_file_alone(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERFLUX_PORT", "nonsense")
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: ok\n"


def test_check_notes_what_serving_still_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert main(["config", "check", str(path)]) == 0
    assert capsys.readouterr().err.startswith("note: to serve this, the environment must change it: ")


def test_check_fails_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("server: {http_port: x}")
    assert main(["config", "check", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f'{path}: server.http_port: must be an integer (got "x")\n'
