"""The store on disk: modes, lock, .bak, what is refused, and what a failing disk leaves behind."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferflux.errors import ConfigError
from inferflux.server.policy.document import PolicyDocument, RateLimit
from inferflux.server.policy.store_file import PolicyFile, PolicyPersistError
from tests.server.policy.conftest import PASSPHRASE


def document(number: int) -> PolicyDocument:
    return PolicyDocument(rate_limit=RateLimit(requests_per_minute=number))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.enc"


@pytest.fixture
def file(path: Path) -> PolicyFile:
    """A store at generation 2, whose .bak is generation 1."""
    file = PolicyFile(path, PASSPHRASE)
    assert file.load() is None
    file.save(document(1))
    file.save(document(2))
    return file


def stored(path: Path, passphrase: str | None = PASSPHRASE) -> tuple[PolicyDocument | None, int]:
    file = PolicyFile(path, passphrase)
    try:
        return file.load(), file.generation
    finally:
        file.close()


def folder_content(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.parent.iterdir() if not entry.name.endswith(".lock")}


def test_saved_is_loaded(file: PolicyFile, path: Path) -> None:
    file.close()
    assert stored(path) == (document(2), 2)
    assert set(folder_content(path)) == {"policy.enc", "policy.enc.bak"}


def test_files_are_private_whatever_the_umask(path: Path) -> None:
    previous = os.umask(0)
    try:
        file = PolicyFile(path, None)
        file.save(document(1))
        file.save(document(2))
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["policy.enc", "policy.enc.bak"])
def test_open_mode_is_tightened(file: PolicyFile, path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    file.close()
    path.with_name(name).chmod(0o644)
    assert stored(path)[1] == 2
    assert stat.S_IMODE(path.with_name(name).stat().st_mode) == 0o600
    assert [record.getMessage() for record in caplog.records] == [
        f"the policy store {path.with_name(name)} was open to other users; now it is not"
    ]


def test_a_store_without_a_copy_is_nothing_to_warn_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = PolicyFile(path, PASSPHRASE)
    first.save(document(1))
    first.close()
    assert stored(path)[1] == 1
    assert caplog.records == []


def test_backup_is_the_generation_before(file: PolicyFile) -> None:
    backup = file.load_backup()
    assert (backup.document, backup.generation) == (document(1), 1)


def test_salt_stays_and_the_key_is_derived_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferflux.server.policy import store_file

    derived: list[object] = []
    real = store_file.Seal
    monkeypatch.setattr(store_file, "Seal", lambda *args: derived.append(args) or real(*args))
    file = PolicyFile(path, PASSPHRASE)
    for number in range(1, 5):
        file.save(document(number))
    assert len(derived) == 1


def test_second_process_is_refused(file: PolicyFile, path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from inferflux.server.policy.store_file import PolicyFile\n"
        "try: PolicyFile(Path(sys.argv[1]), None)\nexcept Exception as error: print(type(error).__name__, error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("ConfigError policy.store: ")
    assert f"in use by another InferFlux (process {os.getpid()})" in result.stdout


def test_a_link_stays_and_what_it_leads_to_is_written(file: PolicyFile, path: Path, tmp_path: Path) -> None:
    """Else the volume behind the link keeps the keys that were revoked since; and two names were two locks."""
    link = tmp_path / "etc" / "policy.enc"
    link.parent.mkdir()
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="in use"):
        PolicyFile(link, PASSPHRASE)
    file.close()
    linked = PolicyFile(link, PASSPHRASE)
    linked.load()
    linked.save(document(3))
    linked.close()
    assert link.is_symlink()
    assert [entry.name for entry in link.parent.iterdir()] == [link.name]
    assert stored(path) == (document(3), 3)


def test_a_link_that_leads_nowhere_yet_leads_to_the_new_store(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    first = PolicyFile(link, PASSPHRASE)
    assert first.load() is None
    first.save(document(1))
    first.close()
    assert link.is_symlink()
    assert stored(path) == (document(1), 1)


def test_lock_ends_with_close(file: PolicyFile, path: Path) -> None:
    with pytest.raises(ConfigError):
        PolicyFile(path, PASSPHRASE)
    file.close()
    PolicyFile(path, PASSPHRASE).close()


@pytest.mark.parametrize(
    ("damage", "passphrase"),
    [
        (lambda content: content, "wrong"),
        (lambda content: content, None),
        (lambda content: content[:-1], PASSPHRASE),
        (lambda content: content[:40], PASSPHRASE),
        (lambda content: b"", PASSPHRASE),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), PASSPHRASE),
        (lambda content: b'{"api_keys":[]}\n', PASSPHRASE),
    ],
    ids=["wrong passphrase", "no passphrase", "truncated", "cut in the header", "empty", "tampered", "plain"],
)
def test_unusable_store_is_refused_and_left_alone(
    file: PolicyFile, path: Path, damage: Callable[[bytes], bytes], passphrase: str | None
) -> None:
    file.close()
    path.write_bytes(damage(path.read_bytes()))
    before = folder_content(path)
    with pytest.raises(ConfigError, match=r"policy\.store: .*policy\.enc: "):
        stored(path, passphrase)
    assert folder_content(path) == before


def test_lost_store_does_not_start_afresh(file: PolicyFile, path: Path) -> None:
    """Seeding from the configuration again could revive a revoked key."""
    file.close()
    path.unlink()
    with pytest.raises(ConfigError, match="inferflux policy restore"):
        stored(path)
    assert not path.exists()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_file_is_refused(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        stored(path)


def test_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be in a folder that can be written"):
        PolicyFile(tmp_path / "not mounted" / "policy.enc", None)
    assert list(tmp_path.iterdir()) == []


def test_order_of_disk_calls(file: PolicyFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content flushed before it is renamed, folder flushed after: what a power cut asks for and kill cannot show."""
    calls: list[str] = []

    def note(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append("fsync folder" if is_folder else name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "replace"):
        note(name)
    file.save(document(3))
    assert calls == ["write", "fsync", "replace", "fsync folder"] * 2


class Fault:
    """Fails the n-th call of one function of `os` with an error number; counts down from there on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, error: int, call: int, times: int = 1) -> None:
        real = getattr(os, name)
        count = 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if call <= count < call + times:
                raise OSError(error, os.strerror(error))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, faulty)


FAULTS = [
    ("write", errno.ENOSPC, 1),
    ("write", errno.ENOSPC, 2),
    ("write", errno.EDQUOT, 2),
    ("fsync", errno.EIO, 1),
    ("fsync", errno.EIO, 2),
    ("fsync", errno.EIO, 3),
    ("fsync", errno.EIO, 4),
    ("replace", errno.EIO, 1),
    ("replace", errno.EACCES, 2),
    ("open", errno.EMFILE, 1),
    ("open", errno.EROFS, 3),
    ("fchmod", errno.EPERM, 2),
]


@pytest.mark.parametrize(("name", "error", "call"), FAULTS)
def test_failed_save_changes_nothing(
    file: PolicyFile, path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int, call: int
) -> None:
    before = folder_content(path)
    with monkeypatch.context() as patch:
        Fault(patch, name, error, call)
        with pytest.raises(PolicyPersistError, match=os.strerror(error)):
            file.save(document(3))
    assert file.generation == 2
    assert folder_content(path) == before, "not the copy either, and no temporary file was left"
    file.save(document(4))
    file.close()
    assert stored(path)[0] == document(4)
    assert stored(path)[1] > 2


@pytest.mark.parametrize(("name", "error", "call"), FAULTS)
def test_failed_save_leaves_the_old_state_for_a_restart(
    file: PolicyFile, path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int, call: int
) -> None:
    with monkeypatch.context() as patch:
        Fault(patch, name, error, call)
        with pytest.raises(PolicyPersistError):
            file.save(document(3))
    file.close()
    assert stored(path) == (document(2), 2)


@pytest.mark.parametrize(("name", "error", "call"), FAULTS)
def test_failed_change_of_the_passphrase_changes_nothing(
    file: PolicyFile, path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int, call: int
) -> None:
    """A copy under a passphrase that was never put in force would be of no use to whoever restores it."""
    before = folder_content(path)
    with monkeypatch.context() as patch:
        Fault(patch, name, error, call)
        with pytest.raises(PolicyPersistError, match="nothing was changed"):
            file.change_passphrase(document(2), "another one")
    assert folder_content(path) == before
    file.close()
    assert stored(path) == (document(2), 2)


def test_failed_first_save_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PolicyFile(path, None)
    with monkeypatch.context() as patch:
        Fault(patch, "fsync", errno.EIO, 2)
        with pytest.raises(PolicyPersistError):
            file.save(document(1))
    assert folder_content(path) == {}
    file.save(document(1))
    file.close()
    assert stored(path, None)[0] == document(1)


def test_disk_that_stays_broken_is_said_loudly(
    file: PolicyFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Fault(monkeypatch, "fsync", errno.EIO, 4, times=100)
    with pytest.raises(PolicyPersistError):
        file.save(document(3))
    assert "may hold a change that was refused" in caplog.text


def test_short_writes_are_continued(file: PolicyFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: real(descriptor, bytes(content[:7])))
        file.save(document(3))
    file.close()
    assert stored(path)[0] == document(3)


def test_real_full_disk(path: Path) -> None:
    """A limit on file sizes makes the kernel write a part and then fail, as a full disk does."""
    code = """
import resource, signal, sys
from pathlib import Path
from inferflux.server.policy.document import Guardrails, PolicyDocument
from inferflux.server.policy.store_file import PolicyFile, PolicyPersistError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = PolicyFile(Path(sys.argv[1]), None)
file.save(PolicyDocument())
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: file.save(PolicyDocument(guardrails=Guardrails(blocklist=tuple(f"{i:100}" for i in range(100)))))
except PolicyPersistError: print("refused")
"""
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout == "refused\n"
    assert stored(path, None) == (PolicyDocument(), 1)
