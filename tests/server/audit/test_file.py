"""The audit file through rotations, crashes, full disks and other people's hands: no line is lost, the chain holds."""

import errno
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from inferflux.server.audit import file as audit_file
from inferflux.server.audit.errors import AuditError
from inferflux.server.audit.file import AuditFile, Record
from inferflux.server.audit.keys import AuditKeys, open_keys
from inferflux.server.audit.lines import GENESIS, parse_line
from inferflux.server.audit.verify import Report, verify


def numbered(numbers: Iterable[int]) -> list[Record]:
    return [Record("request", {"number": number}) for number in numbers]


def numbers_in(*paths: Path) -> list[int]:
    lines = [json.loads(line) for path in paths for line in path.read_bytes().splitlines() if parse_line(line)]
    return [line["number"] for line in lines if "number" in line]


def assert_sound(keys: AuditKeys, *paths: Path) -> Report:
    report = verify(paths, keys)
    assert report.findings == []
    return report


@pytest.fixture
def log(log_path: Path, keys: AuditKeys) -> AuditFile:
    return AuditFile(log_path, keys)


def test_lines_are_chained_in_a_private_file(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    log.append(numbered([1, 2]), durable=False)
    log.append(numbered([3]), durable=True)
    log.close()
    assert log_path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["file", "request", "request", "request"]
    assert [line["prev"] for line in lines] == [GENESIS, GENESIS, lines[1]["digest"], lines[2]["digest"]]
    assert assert_sound(keys, log_path).num_lines == 3


def test_a_new_file_is_flushed_with_its_name(log: AuditFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut asks for: a change was answered, so the file with its line must be there."""
    flushed: list[bool] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    log.append(numbered([1]), durable=True)
    assert flushed == [False, True, False], "the header, the folder, the line"
    log.append(numbered([2]), durable=False)
    assert len(flushed) == 3
    log.close()


def test_a_restart_goes_on_with_the_chain(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    log.append(numbered([1]), durable=False)
    log.close()
    again = AuditFile(log_path, keys)
    again.append(numbered([2]), durable=False)
    again.close()
    assert numbers_in(log_path) == [1, 2]
    assert assert_sound(keys, log_path).notes == []


def test_a_moved_file_is_left_and_the_next_one_linked_to_it(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    moved = [log_path.with_name(f"audit.log.{index}") for index in range(2)]
    log.append(numbered([1]), durable=False)
    log_path.rename(moved[0])
    log.append(numbered([2]), durable=False)
    log_path.rename(moved[1])
    log_path.touch(0o600)  # logrotate's `create`
    log.append(numbered([3]), durable=False)
    assert log._recent_bytes == sum(len(batch.data) for batch in log._recent), "else too little is kept to repeat"
    log.close()
    assert [numbers_in(path) for path in (*moved, log_path)] == [[1], [2], [3]]
    assert assert_sound(keys, *moved, log_path).notes == []
    assert "goes on with an earlier file" in assert_sound(keys, log_path).notes[0]
    assert verify([moved[0], log_path], keys).findings, "a whole file is missing between the two"


@pytest.mark.parametrize("name", ["audit.log.1", "audit.log-20250131"])
@pytest.mark.parametrize("creates", [False, True])
def test_a_rotation_while_no_server_runs_breaks_no_chain(
    log_path: Path, keys: AuditKeys, name: str, creates: bool
) -> None:
    """Else every rotation during an upgrade read as a log that was tampered with."""
    paths = [log_path.with_name(f"{name}.{age}") for age in (2, 1)]
    for number, path in enumerate((*paths, log_path)):
        log = AuditFile(log_path, keys)
        log.append(numbered([number]), durable=False)
        log.close()
        if path != log_path:
            log_path.rename(path)
            os.utime(path, (number, number))
        if creates:
            log_path.touch(0o600)
    log_path.with_name("audit.log.3").write_bytes(b"another program's")
    assert assert_sound(keys, *paths, log_path).num_lines == 3
    assert verify([paths[0], log_path], keys).findings, "a whole file is missing between the two"


@pytest.mark.parametrize("num_late", [0, 1, 3])
def test_lines_written_while_a_copy_is_made_are_written_again(
    log: AuditFile, log_path: Path, keys: AuditKeys, num_late: int
) -> None:
    """copytruncate: what comes between the copying and the truncating would be in neither file."""
    copy = log_path.with_name("audit.log.1")
    log.append(numbered([1, 2]), durable=False)
    shutil.copyfile(log_path, copy)
    for number in range(3, 3 + num_late):
        log.append(numbered([number]), durable=False)
    os.truncate(log_path, 0)
    log.append(numbered([9]), durable=False)
    log.close()
    assert set(numbers_in(copy, log_path)) == {1, 2, *range(3, 3 + num_late), 9}
    assert_sound(keys, log_path)
    assert_sound(keys, copy, log_path)


def test_a_truncation_just_before_a_write_is_noticed_after_it(
    log: AuditFile, log_path: Path, keys: AuditKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(numbered([1]), durable=False)
    write = os.write

    def truncate_first(descriptor: int, data: memoryview) -> int:
        monkeypatch.setattr(audit_file.os, "write", write)
        os.truncate(log_path, 0)
        return write(descriptor, data)

    monkeypatch.setattr(audit_file.os, "write", truncate_first)
    log.append(numbered([2]), durable=False)
    assert numbers_in(log_path) == [1, 2]
    assert_sound(keys, log_path)
    log.close()


@pytest.mark.parametrize("num_missing", [1, 20])
def test_what_a_crash_cut_short_breaks_no_chain_when_it_is_rotated(
    log: AuditFile, log_path: Path, keys: AuditKeys, num_missing: int
) -> None:
    """num_missing: bytes of the last line. The copy of logrotate's copytruncate is made before the server has started
    again, or all of it happens before."""
    log.append(numbered([1, 2]), durable=False)
    log.close()
    os.truncate(log_path, log_path.stat().st_size - num_missing)
    copy, moved = log_path.with_name("audit.log.2"), log_path.with_name("audit.log.1")
    shutil.copyfile(log_path, copy)
    again = AuditFile(log_path, keys)
    again.follow()
    os.truncate(log_path, 0)
    again.append(numbered([3]), durable=False)
    again.close()
    assert_sound(keys, copy, log_path)
    copy.rename(moved)
    log_path.unlink()
    after = AuditFile(log_path, keys)
    after.append(numbered([4]), durable=False)
    after.close()
    assert_sound(keys, moved, log_path)


def test_old_lines_are_not_repeated(log: AuditFile, log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, audit_file.REPEAT_S)
    monkeypatch.setattr(audit_file.time, "monotonic", lambda: float(next(clock)))
    for number in range(5):
        log.append(numbered([number]), durable=False)
    os.truncate(log_path, 0)
    log.append(numbered([5]), durable=False)
    log.close()
    assert numbers_in(log_path) == [3, 4, 5]


def test_every_torn_end_is_kept_and_told_apart_from_an_edit(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    log.append(numbered([1, 2]), durable=False)
    log.close()
    content = log_path.read_bytes()
    header_end = content.index(b"\n") + 1
    borders = [place + step for place, byte in enumerate(content) if byte == 0x0A for step in (-1, 0, 1)]
    for size in sorted({*range(0, len(content), 23), *borders}):
        log_path.write_bytes(content[:size])
        if size >= header_end:
            torn = content[size - 1] != 0x0A and parse_line(content[:size].rpartition(b"\n")[2]) is None
            assert ("is torn" in "".join(assert_sound(keys, log_path).notes)) == torn
        again = AuditFile(log_path, keys)
        again.append(numbered([3]), durable=False)
        again.close()
        if size >= header_end:
            assert log_path.read_bytes().startswith(content[:size]), "what was there is kept"
            assert ("is torn" in "".join(assert_sound(keys, log_path).notes)) == torn
        assert_sound(keys, log_path)
        assert numbers_in(log_path)[-1] == 3


def test_a_crash_while_recovering_from_a_crash(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    log.append(numbered([1]), durable=False)
    log.close()
    with log_path.open("ab") as file:
        file.write(b'{"kind":"request","half\n{"kind":"torn","ha')
    again = AuditFile(log_path, keys)
    again.append(numbered([2]), durable=False)
    again.close()
    assert len(assert_sound(keys, log_path).notes) == 2


Fault = Callable[[int, memoryview], int]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("num_written", [0, 1, 50])
def test_a_failed_write_leaves_the_file_as_it_was(
    log: AuditFile,
    log_path: Path,
    keys: AuditKeys,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    num_written: int,
) -> None:
    log.append(numbered([1]), durable=False)
    before = log_path.read_bytes()
    write = os.write
    calls = itertools.count()

    def fail(descriptor: int, data: memoryview) -> int:
        if next(calls) == 0 and num_written:
            return write(descriptor, data[:num_written])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(audit_file.os, "write", fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            log.append(numbered([2]), durable=False)
    assert log_path.read_bytes() == before
    log.append(numbered([3]), durable=False)
    log.close()
    assert numbers_in(log_path) == [1, 3]
    assert_sound(keys, log_path)


def test_a_write_that_fails_as_the_file_is_truncated_fills_nothing_up(
    log: AuditFile, log_path: Path, keys: AuditKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(numbered([1]), durable=False)

    def fail(_descriptor: int, _data: memoryview) -> int:
        os.truncate(log_path, 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full_disk:
        full_disk.setattr(audit_file.os, "write", fail)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            log.append(numbered([2]), durable=False)
    assert log_path.stat().st_size == 0
    log.append(numbered([3]), durable=False)
    log.close()
    assert numbers_in(log_path) == [1, 3]
    assert_sound(keys, log_path)


def test_what_cannot_be_flushed_is_not_in_the_log(
    log: AuditFile, log_path: Path, keys: AuditKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(numbered([1]), durable=True)
    with monkeypatch.context() as patch:
        patch.setattr(audit_file.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
        with pytest.raises(OSError, match="EIO"):
            log.append(numbered([2]), durable=True)
    log.append(numbered([3]), durable=True)
    log.close()
    assert numbers_in(log_path) == [1, 3]
    assert_sound(keys, log_path)


def test_a_half_written_line_that_cannot_be_taken_back_counts_as_torn(
    log: AuditFile, log_path: Path, keys: AuditKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(numbered([1]), durable=False)
    write = os.write
    calls = itertools.count()

    def fail(descriptor: int, data: memoryview) -> int:
        if next(calls) == 0:
            return write(descriptor, data[:30])
        raise OSError(errno.EIO, "EIO")

    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "EIO")

    with monkeypatch.context() as patch:
        patch.setattr(audit_file.os, "write", fail)
        patch.setattr(audit_file.os, "ftruncate", refuse)
        with pytest.raises(OSError, match="EIO"):
            log.append(numbered([2]), durable=False)
    log.append(numbered([3]), durable=False)
    log.close()
    assert numbers_in(log_path) == [1, 3]
    assert "is torn" in assert_sound(keys, log_path).notes[0]


def test_lines_to_repeat_outlive_a_full_disk(
    log: AuditFile, log_path: Path, keys: AuditKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(numbered([1]), durable=False)
    os.truncate(log_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(audit_file.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            log.append(numbered([2]), durable=False)
    log.append(numbered([3]), durable=False)
    log.close()
    assert numbers_in(log_path) == [1, 3]
    assert_sound(keys, log_path)


def test_one_writer_at_a_time(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    log.append(numbered([1]), durable=False)
    content = log_path.read_bytes()
    with pytest.raises(AuditError, match="another process"):
        AuditFile(log_path, keys).follow()
    assert log_path.read_bytes() == content
    log.close()
    AuditFile(log_path, keys).follow()


@pytest.mark.parametrize("content", [b"127.0.0.1 GET /\n", b"{}\n", b"\n", b"\0" * 100, b"no line feed"])
def test_another_programs_file_is_left_alone(log: AuditFile, log_path: Path, content: bytes) -> None:
    log_path.write_bytes(content)
    with pytest.raises(AuditError, match="not an audit log"):
        log.append(numbered([1]), durable=False)
    assert log_path.read_bytes() == content


def test_another_keys_log_is_left_alone(log: AuditFile, log_path: Path, tmp_path: Path) -> None:
    log.append(numbered([1]), durable=False)
    log.close()
    content = log_path.read_bytes()
    with pytest.raises(AuditError, match="another key"):
        AuditFile(log_path, open_keys(tmp_path / "other.key", None)).append(numbered([2]), durable=False)
    assert log_path.read_bytes() == content


def test_only_a_regular_file_will_do(log: AuditFile, log_path: Path) -> None:
    os.mkfifo(log_path)
    with pytest.raises(AuditError, match="regular file"):
        log.follow()


def test_what_somebody_else_adds_is_found_and_harms_nothing(log: AuditFile, log_path: Path, keys: AuditKeys) -> None:
    log.append(numbered([1]), durable=False)
    with log_path.open("ab") as file:
        file.write(b'{"kind":"request","number":666}\n')
    log.append(numbered([2]), durable=False)
    log.close()
    assert [(finding.line, finding.message) for finding in verify([log_path], keys).findings] == [
        (3, "was added or its neighbours moved")
    ]
