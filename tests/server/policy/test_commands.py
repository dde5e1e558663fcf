"""`inferflux policy restore` and `rekey` as a shell sees them."""

import errno
import io
import os
from pathlib import Path

import pytest

from inferflux.cli import main
from inferflux.config.process_env import PASSPHRASE_VARIABLE
from inferflux.errors import ConfigError
from inferflux.server.access.key_generation import generate_key
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.audit.keys import key_path, open_keys
from inferflux.server.policy import store_file
from inferflux.server.policy.document import PolicyDocument, add_key, revoke_key
from inferflux.server.policy.store_file import PolicyFile
from tests.server.policy.conftest import PASSPHRASE

NEW = generate_key()
RECORD = KeyRecord(
    id=NEW.id, prefix=NEW.prefix, digest=NEW.digest, name="alice", tenant="t", scopes=("read",), created=1
)
WITH_KEY = add_key(PolicyDocument(), RECORD)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose key was revoked; .bak still has it."""
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    path = tmp_path / "policy.enc"
    file = PolicyFile(path, PASSPHRASE)
    file.save(WITH_KEY)
    file.save(revoke_key(WITH_KEY, RECORD.id))
    file.close()
    return path


def stored(path: Path, passphrase: str | None = PASSPHRASE) -> tuple[PolicyDocument | None, int]:
    file = PolicyFile(path, passphrase)
    try:
        return file.load(), file.generation
    finally:
        file.close()


def test_restore_brings_the_last_copy_back_and_names_revived_keys(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy", "restore", "--store", str(path), "--yes"]) == 0
    assert stored(path) == (WITH_KEY, 3)
    assert f"API key {RECORD.id} (alice) works again" in capsys.readouterr().err


def test_restore_can_be_undone(path: Path) -> None:
    for _ in range(2):
        assert main(["policy", "restore", "--store", str(path), "--yes"]) == 0
    assert stored(path) == (PolicyDocument(), 4)


def test_restore_asks(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    assert main(["policy", "restore", "--store", str(path)]) == 2
    assert "pass --yes" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(("answer", "code", "kept"), [("y\n", 0, WITH_KEY), ("\n", 1, PolicyDocument())])
def test_restore_does_what_it_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, kept: PolicyDocument
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["policy", "restore", "--store", str(path)]) == code
    assert stored(path)[0] == kept


def test_restore_of_a_damaged_store_keeps_it_aside(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"noise")
    assert main(["policy", "restore", "--store", str(path), "--yes"]) == 0
    assert stored(path) == (WITH_KEY, 2)
    assert path.with_name("policy.enc.damaged").read_bytes() == b"noise"
    assert "is not a policy store" in capsys.readouterr().err


def test_restore_of_a_lost_store(path: Path) -> None:
    path.unlink()
    assert main(["policy", "restore", "--store", str(path), "--yes"]) == 0
    assert stored(path)[0] == WITH_KEY


@pytest.mark.parametrize("content", [None, b"noise"], ids=["missing", "damaged"])
def test_restore_without_a_good_copy_changes_nothing(
    path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    backup = path.with_name("policy.enc.bak")
    backup.unlink() if content is None else backup.write_bytes(content)
    before = path.read_bytes()
    assert main(["policy", "restore", "--store", str(path), "--yes"]) == 2
    assert path.read_bytes() == before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_commands_are_refused_while_a_server_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = PolicyFile(path, PASSPHRASE)
    assert main(["policy", "restore", "--store", str(path), "--yes"]) == 2
    server.close()
    assert "in use by another InferFlux" in capsys.readouterr().err


def test_rekey_leaves_nothing_the_old_passphrase_opens(path: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("tr\u00e8s secret\n")
    assert main(["policy", "rekey", "--store", str(path), "--new-passphrase-file", str(tmp_path / "new")]) == 0
    assert stored(path, "tr\u00e8s secret") == (PolicyDocument(), 4)
    for each in (path, path.with_name("policy.enc.bak")):
        file = PolicyFile(tmp_path / "copy", PASSPHRASE)
        file.path.write_bytes(each.read_bytes())
        with pytest.raises(ConfigError, match="cannot be decrypted"):
            file.load()
        file.close()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_end_is_no_part_of_the_passphrase(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Kubernetes gives what a file holds, line end and all; a shell's $(cat FILE) and rekey give it without."""
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE + end)
    assert rekey(path, tmp_path) == 0
    monkeypatch.setenv(PASSPHRASE_VARIABLE, f"new{end}")
    assert rekey(path, tmp_path) == 0


def test_rekey_encrypts_a_plain_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\n")))
    file = PolicyFile(path, None)
    file.save(WITH_KEY)
    file.close()
    assert main(["policy", "rekey", "--store", str(path), "--new-passphrase-file", "-"]) == 0
    assert stored(path, "from stdin")[0] == WITH_KEY
    assert RECORD.digest.encode() not in b"".join(entry.read_bytes() for entry in tmp_path.iterdir())


@pytest.mark.parametrize("new", [b"", b"two\nlines\n", b"\xff\xfe"], ids=["empty", "two lines", "no text"])
def test_unfit_new_passphrase_changes_nothing(path: Path, tmp_path: Path, new: bytes) -> None:
    (tmp_path / "new").write_bytes(new)
    before = path.read_bytes()
    assert main(["policy", "rekey", "--store", str(path), "--new-passphrase-file", str(tmp_path / "new")]) == 2
    assert path.read_bytes() == before


def test_rekey_with_the_wrong_present_passphrase(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").write_text("new")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "wrong passphrase")
    before = path.read_bytes()
    assert main(["policy", "rekey", "--store", str(path), "--new-passphrase-file", str(tmp_path / "new")]) == 2
    assert path.read_bytes() == before
    assert "wrong passphrase" not in capsys.readouterr().err


def rekey(path: Path, tmp_path: Path, *options: str) -> int:
    (tmp_path / "new").write_text("new")
    return main(["policy", "rekey", "--store", str(path), "--new-passphrase-file", str(tmp_path / "new"), *options])


@pytest.mark.parametrize("named", [True, False], ids=["named", "configured"])
def test_rekey_takes_the_audit_logs_key_along(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    log = tmp_path / "audit.log"
    keys = open_keys(key_path(log), PASSPHRASE)
    if named:
        assert rekey(path, tmp_path, "--audit-log", str(log)) == 0
    else:
        monkeypatch.setenv("INFERFLUX_AUDIT_LOG", str(log))
        assert rekey(path, tmp_path) == 0
    assert open_keys(key_path(log), "new") == keys
    with pytest.raises(ConfigError, match="wrong passphrase"):
        open_keys(key_path(log), PASSPHRASE)


def test_rekey_without_an_audit_log_makes_none(path: Path, tmp_path: Path) -> None:
    assert rekey(path, tmp_path, "--audit-log", str(tmp_path / "audit.log")) == 0
    assert not key_path(tmp_path / "audit.log").exists()


@pytest.mark.parametrize(
    ("error", "code", "present"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, PASSPHRASE), (KeyboardInterrupt(), 130, "new")],
    ids=["full disk", "interrupted"],
)
def test_a_rekey_that_does_not_come_to_its_end_may_be_repeated(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, present: str
) -> None:
    """present: what opens the audit log's key then; a server starts as before when the command says that nothing was
    changed."""
    log = tmp_path / "audit.log"
    keys = open_keys(key_path(log), PASSPHRASE)

    def fail(_path: Path, _content: bytes) -> None:
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(store_file, "write_file", fail)
        assert rekey(path, tmp_path, "--audit-log", str(log)) == code
    assert stored(path)[0] == PolicyDocument()
    assert open_keys(key_path(log), present) == keys
    assert rekey(path, tmp_path, "--audit-log", str(log)) == 0
    assert stored(path, "new")[0] == PolicyDocument()
    assert open_keys(key_path(log), "new") == keys


def test_rekey_with_a_key_under_another_passphrase_changes_nothing(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    open_keys(key_path(log), "a third passphrase")
    before = path.read_bytes(), key_path(log).read_bytes()
    assert rekey(path, tmp_path, "--audit-log", str(log)) == 2
    assert (path.read_bytes(), key_path(log).read_bytes()) == before
