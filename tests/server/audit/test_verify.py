"""`inferflux audit verify`: whatever is done to a log's lines shows, and where."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from inferflux.cli import main
from inferflux.server.audit.file import AuditFile, Record
from inferflux.server.audit.keys import AuditKeys, key_path, open_keys
from inferflux.server.audit.lines import GENESIS, make_header, make_line, parse_line
from inferflux.server.audit.verify import verify

NUM_LINES = 12


@pytest.fixture
def lines(log_path: Path, keys: AuditKeys) -> list[bytes]:
    """A sound log's lines; the first is the header."""
    log = AuditFile(log_path, keys)
    log.append(
        [Record("request", {"number": number, "text": "x" * number}) for number in range(NUM_LINES)], durable=True
    )
    log.close()
    return log_path.read_bytes().splitlines(keepends=True)


def findings(path: Path, lines: list[bytes], keys: AuditKeys | None) -> list[int]:
    path.write_bytes(b"".join(lines))
    return [finding.line for finding in verify([path], keys).findings]


@pytest.mark.parametrize("with_keys", [True, False])
def test_any_changed_byte_is_found(log_path: Path, lines: list[bytes], keys: AuditKeys, with_keys: bool) -> None:
    choose = random.Random(3)
    content = b"".join(lines)
    for place in choose.sample(range(len(content) - 1), 400):
        changed = bytearray(content)
        changed[place] = choose.choice([byte for byte in range(256) if byte != content[place]])
        log_path.write_bytes(changed)
        found = verify([log_path], keys if with_keys else None).findings
        assert content[:place].count(b"\n") + 1 in {finding.line for finding in found} | {
            finding.line - 1 for finding in found
        }


def test_any_missing_line_is_found(log_path: Path, lines: list[bytes], keys: AuditKeys) -> None:
    for index in range(NUM_LINES):
        assert findings(log_path, lines[:index] + lines[index + 1 :], None) == [index + 1]


def test_missing_last_lines_are_the_one_thing_no_file_can_tell(
    log_path: Path, lines: list[bytes], keys: AuditKeys
) -> None:
    """But the digest printed differs from one noted elsewhere."""
    head = verify([log_path], keys).head
    assert findings(log_path, lines[:-1], keys) == []
    assert verify([log_path], keys).head != head


def test_any_two_lines_in_each_others_place_are_found(log_path: Path, lines: list[bytes], keys: AuditKeys) -> None:
    choose = random.Random(4)
    for _ in range(50):
        first, second = sorted(choose.sample(range(NUM_LINES + 1), 2))
        swapped = list(lines)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        assert findings(log_path, swapped, None)


def test_any_line_given_twice_is_found(log_path: Path, lines: list[bytes], keys: AuditKeys) -> None:
    for index in range(NUM_LINES + 1):
        for place in range(NUM_LINES + 2):
            assert findings(log_path, [*lines[:place], lines[index], *lines[place:]], None)


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"garbage\n", b'{"kind":"request"}\n'])
def test_any_added_line_is_found(log_path: Path, lines: list[bytes], keys: AuditKeys, line: bytes) -> None:
    for place in range(NUM_LINES + 2):
        assert place + 1 in findings(log_path, [*lines[:place], line, *lines[place:]], None)


def test_a_chain_made_anew_without_the_key_is_found(log_path: Path, tmp_path: Path, keys: AuditKeys) -> None:
    forger = open_keys(tmp_path / "forger.key", None)
    line, _ = make_line("request", {"number": 1}, GENESIS, forger)
    forged = [make_header(GENESIS, "2025", forger), line]
    assert findings(log_path, forged, None) == []
    assert findings(log_path, forged, keys) == [1, 2]


def test_a_beginning_cut_off_and_covered_up_is_found(log_path: Path, lines: list[bytes], keys: AuditKeys) -> None:
    """Another sound header of the same log does not fit, a fitting one needs the key."""
    assert findings(log_path, [lines[0], *lines[3:]], keys) == [2]


def test_a_torn_record_covers_only_what_it_was_made_for(log_path: Path, lines: list[bytes], keys: AuditKeys) -> None:
    log_path.write_bytes(b"".join(lines)[:-10])
    log = AuditFile(log_path, keys)
    log.append([Record("request", {"number": 99})], durable=True)
    log.close()
    torn = log_path.read_bytes().splitlines(keepends=True)
    assert findings(log_path, torn, keys) == []
    assert findings(log_path, torn[:NUM_LINES] + torn[NUM_LINES + 1 :], keys) == [NUM_LINES + 1], "it was removed"
    assert findings(log_path, torn[: NUM_LINES - 1] + torn[NUM_LINES:], keys) == [NUM_LINES], "the line before it was"
    torn[NUM_LINES] = torn[NUM_LINES][:20] + b"9" + torn[NUM_LINES][21:]
    assert findings(log_path, torn, keys) == [NUM_LINES + 1]


Edit = Callable[[list[bytes]], list[bytes]]


@pytest.mark.parametrize(
    ("edit", "code", "said"),
    [
        (lambda lines: lines, 0, "ok, 12 lines"),
        (lambda lines: [], 0, "ok, 0 lines"),
        (lambda lines: [*lines[:-1], lines[-1][:-20]], 0, "line 13 is torn"),
        (lambda lines: [*lines[:-1], lines[-1].replace(b"xx", b"xy", 1)], 1, "line 13 was changed"),
        (lambda lines: lines[:4] + lines[5:], 1, "line 5 does not follow the line before it"),
        (lambda lines: lines[3:], 1, "line 1 is not the line this file began with"),
    ],
)
def test_the_command(
    log_path: Path, lines: list[bytes], capsys: pytest.CaptureFixture[str], edit: Edit, code: int, said: str
) -> None:
    log_path.write_bytes(b"".join(edit(lines)))
    assert main(["audit", "verify", str(log_path)]) == code
    output = capsys.readouterr()
    assert said in output.out + output.err
    assert "Traceback" not in output.err


def test_the_command_finds_the_key_of_a_rotated_log(
    log_path: Path, lines: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    log_path.rename(log_path.with_name("audit.log.1"))
    assert main(["audit", "verify", str(log_path.with_name("audit.log.1"))]) == 0
    assert "not checked" not in capsys.readouterr().err
    key_path(log_path).rename(log_path.with_name("elsewhere"))
    assert main(["audit", "verify", str(log_path.with_name("audit.log.1"))]) == 0
    assert "not checked" in capsys.readouterr().err
    assert main(["audit", "verify", f"{log_path}.1", "--key", str(log_path.with_name("elsewhere"))]) == 0


def test_the_command_without_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["audit", "verify", str(tmp_path / "none"), "--key", str(tmp_path / "no-key")]) == 2


def test_an_empty_file_is_noted_and_hides_no_missing_one(
    log_path: Path, lines: list[bytes], keys: AuditKeys, capsys: pytest.CaptureFixture[str]
) -> None:
    """logrotate makes one; so does who wipes the log."""
    empty = log_path.with_name("empty")
    empty.touch()
    assert main(["audit", "verify", str(empty), str(log_path)]) == 0
    assert "empty: is empty" in capsys.readouterr().err
    later = log_path.with_name("later")
    head = verify([log_path], keys).head
    later.write_bytes(make_header(head, "2025", keys))
    assert verify([log_path, empty, later], keys).findings == []
    assert verify([empty, later], keys).findings == []
    later.write_bytes(make_header("1" * 64, "2025", keys))
    assert [finding.line for finding in verify([log_path, empty, later], keys).findings] == [1]


def test_a_log_begun_anew_after_another_is_one_finding(log_path: Path, lines: list[bytes], keys: AuditKeys) -> None:
    anew = log_path.with_name("anew")
    chain = [make_header(GENESIS, "2025", keys)]
    head = GENESIS
    for number in range(3):
        line, head = make_line("request", {"other": number}, head, keys)
        chain.append(line)
    anew.write_bytes(b"".join(chain))
    assert [finding.line for finding in verify([log_path, anew], keys).findings] == [2]


def forged(kind: str, inside: bytes, prev: str) -> bytes:
    """A line with the right digest, which needs no key, and with anything at all between kind and `prev`."""
    sealed = b'{"kind":"%s"%s"prev":"%s","mac":"%s"' % (kind.encode(), inside, prev.encode(), b"0" * 64)
    return sealed + b',"digest":"%s"}\n' % hashlib.sha256(sealed).hexdigest().encode()


@pytest.mark.parametrize("inside", [b",not JSON,", b",\xff", b',"x":' + b"[" * 100_000 + b',"y', b',"x\\'])
def test_a_forged_line_that_is_no_json_is_a_finding(
    log_path: Path, lines: list[bytes], keys: AuditKeys, inside: bytes
) -> None:
    """It claims that a crash tore the line before it, which would explain away what was done to that."""
    prev = parse_line(lines[3].rstrip())
    assert prev is not None
    line = forged("torn", inside, prev.digest)
    assert parse_line(line.rstrip()) is not None
    assert findings(log_path, [*lines[:4], b"changed\n", line, *lines[5:]], keys)[:2] == [5, 6]
