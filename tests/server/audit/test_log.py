"""The audit log as the server uses it: never in the way, never silent about what it could not write, no secrets."""

import asyncio
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferflux.errors import ConfigError
from inferflux.server.audit import AuditError, AuditEvent, AuditLog
from inferflux.server.audit import file as audit_file
from inferflux.server.audit import log as audit_log
from inferflux.server.audit.event import text_digest
from inferflux.server.audit.file import AuditFile
from inferflux.server.audit.keys import AuditKeys
from inferflux.server.audit.verify import verify
from tests.support.waiting import PATIENCE_S, patience, until, wait_until

PROMPT = "canary prompt"


def event(number: int = 0, **fields: Any) -> AuditEvent:
    values = {"request_id": f"req_{number}", "route": "/v1/completions", "decision": "allowed", "status": 200}
    return AuditEvent(**(values | fields))


def records(*paths: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    return [line for line in lines if line["kind"] != "file"]


@pytest.fixture(autouse=True)
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "TICK_S", 0.01)


@pytest.fixture
def make_log(log_path: Path, keys: AuditKeys) -> Iterator[Callable[..., AuditLog]]:
    logs: list[AuditLog] = []

    def make(**options: Any) -> AuditLog:
        logs.append(AuditLog(log_path, keys, **options))
        logs[-1].start()
        return logs[-1]

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def log(make_log: Callable[..., AuditLog]) -> AuditLog:
    return make_log()


class Disk:
    """Writes that fail as long as `error` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: OSError | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()
        self._write = os.write
        monkeypatch.setattr(audit_file.os, "write", self.write)

    def write(self, descriptor: int, data: memoryview) -> int:
        self.entered.set()
        assert self.hold.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return self._write(descriptor, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_what_a_line_says(make_log: Callable[..., AuditLog], log_path: Path, keys: AuditKeys) -> None:
    log = make_log(clock=lambda: 1_700_000_000.125)
    log.record(
        event(
            7,
            caller="key_1",
            tenant="acme",
            model="demo",
            prompt_tokens=3,
            completion_tokens=4,
            prompt=(PROMPT, "second"),
            response=("answer",),
        )
    )
    log.close()
    (line,) = records(log_path)
    assert {name: value for name, value in line.items() if name not in ("prev", "mac", "digest")} == {
        "kind": "request",
        "time": "2023-11-14T22:13:20.125+00:00",
        "request_id": "req_7",
        "caller": "key_1",
        "tenant": "acme",
        "route": "/v1/completions",
        "model": "demo",
        "decision": "allowed",
        "status": 200,
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "prompt_hmac": text_digest((PROMPT, "second"), keys),
        "response_hmac": text_digest(("answer",), keys),
    }
    assert PROMPT not in log_path.read_text()


def test_texts_are_written_only_when_asked_for(make_log: Callable[..., AuditLog], log_path: Path) -> None:
    log = make_log(with_text=True)
    log.record(event(prompt=(PROMPT,), response=("answer",)))
    log.close()
    (line,) = records(log_path)
    assert (line["prompt"], line["response"]) == ([PROMPT], ["answer"])


def test_digests_tell_texts_apart_and_need_the_key(keys: AuditKeys, tmp_path: Path) -> None:
    digests = {text_digest(texts, keys) for texts in (("ab",), ("a", "b"), ("ab", ""), ("", "ab"), ())}
    assert len(digests) == 5
    assert text_digest(("ab",), keys) == text_digest(("ab",), keys)
    assert text_digest(("\ud800",), keys)


HOSTILE = 'x"}\n{"kind":"request"}\r\x1b[31m\x00\x7f\x85\x9b\u2028\u2029\u202e\ud800é\\'


def test_no_value_breaks_out_of_its_line(log: AuditLog, log_path: Path, keys: AuditKeys) -> None:
    log.record(event(model=HOSTILE, caller=HOSTILE, tenant=HOSTILE, decision=HOSTILE, change={HOSTILE: HOSTILE}))
    log.close()
    content = log_path.read_bytes()
    assert content.count(b"\n") == 2
    assert set(content) - {0x0A} <= set(range(0x20, 0x7F))
    (line,) = records(log_path)
    assert line["model"] == HOSTILE
    assert verify([log_path], keys).findings == []


def test_a_callers_words_are_cut_short(log: AuditLog, log_path: Path) -> None:
    log.record(event(model="m" * 1_000_000))
    log.close()
    assert log_path.stat().st_size < 2000


async def test_an_admin_record_is_on_the_disk_when_it_returns(log: AuditLog, log_path: Path) -> None:
    await log.record_admin(event(kind="admin", change={"blocklist": 3}))
    assert [line["kind"] for line in records(log_path)] == ["admin"]


async def test_a_full_disk_refuses_admin_changes_and_counts_the_rest(
    make_log: Callable[..., AuditLog], log_path: Path, keys: AuditKeys, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[tuple[int, int]] = []
    log = make_log(on_result=lambda written, dropped: results.append((written, dropped)))
    await log.record_admin(event(1))
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    for number in range(2, 5):
        log.record(event(number))
    with pytest.raises(AuditError):
        await log.record_admin(event(5))
    assert not log.healthy
    assert (log.num_written, log.num_dropped) == (1, 4)
    disk.error = None
    wait_until(lambda: log.healthy)
    await log.record_admin(event(6))
    log.close()
    written = records(log_path)
    assert [line.get("request_id") for line in written if line["kind"] == "request"] == ["req_1", "req_6"]
    assert sum(line["count"] for line in written if line["kind"] == "dropped") == 4
    assert (sum(result[0] for result in results), sum(result[1] for result in results)) == (2, 4)
    assert caplog.text.count("cannot be written") == 1, "one line for people, not one per record"
    assert verify([log_path], keys).findings == []


async def test_a_stuck_disk_stops_neither_the_event_loop_nor_grows_the_queue(
    log: AuditLog, log_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "MAX_QUEUED", 100)
    disk.hold.clear()
    log.record(event())
    wait_until(disk.entered.is_set)
    start = time.monotonic()
    assert sum(log.record(event(number)) for number in range(1000)) == 100
    assert log.num_dropped == 900
    with pytest.raises(AuditError, match="cannot take more records"):
        await log.record_admin(event(1000))
    assert time.monotonic() - start < PATIENCE_S / 2, "it waited for the disk"
    disk.hold.set()
    log.close()
    kinds = [line["kind"] for line in records(log_path)]
    assert kinds.count("request") == 101
    assert [line["count"] for line in records(log_path) if line["kind"] == "dropped"] == [901]


def test_long_texts_in_the_queue_are_bounded(log: AuditLog, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_QUEUED_CHARS", 1000)
    disk.hold.clear()
    log.record(event())
    wait_until(disk.entered.is_set)
    assert [log.record(event(prompt=("x" * 400,))) for _ in range(4)] == [True, True, False, False]
    disk.hold.set()


async def test_a_cancelled_wait_stops_nothing(log: AuditLog, log_path: Path, disk: Disk) -> None:
    disk.hold.clear()
    waiting = asyncio.create_task(log.record_admin(event(1)))
    await until(disk.entered.is_set)
    waiting.cancel()
    disk.hold.set()
    await log.record_admin(event(2))
    assert len(records(log_path)) == 2


async def test_an_event_that_cannot_be_written_down_harms_no_other(log: AuditLog, log_path: Path) -> None:
    with pytest.raises(AuditError):
        await log.record_admin(event(1, change={"x": object()}))
    await log.record_admin(event(2))
    assert [line["request_id"] for line in records(log_path) if line["kind"] == "request"] == ["req_2"]


async def test_closed_means_closed(log: AuditLog, log_path: Path) -> None:
    log.record(event(1))
    log.close()
    assert len(records(log_path)) == 1
    assert not log.record(event(2))
    with pytest.raises(AuditError):
        await log.record_admin(event(3))
    log.close()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("something else\n")])
def test_a_log_that_cannot_be_used_stops_the_start(
    log_path: Path, keys: AuditKeys, make: Callable[[Path], Any]
) -> None:
    make(log_path)
    log = AuditLog(log_path, keys)
    with pytest.raises(ConfigError, match=r"logging\.audit_log: .*audit\.log"):
        log.start()
    log.close()


NUM_THREADS = 4
NUM_EVENTS = 400


@pytest.mark.parametrize("how", ["move", "copytruncate"])
def test_no_line_is_lost_in_rotations_under_load(
    log: AuditLog, log_path: Path, keys: AuditKeys, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_file, "REPEAT_S", PATIENCE_S)  # this machine may stand still between copy and truncation
    rotated: list[Path] = []

    def write(thread: int) -> None:
        for number in range(NUM_EVENTS):
            wait_until(lambda due=3 * number // NUM_EVENTS: len(rotated) >= due)
            while not log.record(event(thread * NUM_EVENTS + number)):
                time.sleep(0.001)
            if number % 20 == 0:
                time.sleep(0.002)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.005)
        if not log_path.exists() or log_path.stat().st_size < 3000:
            continue
        rotated.append(log_path.with_name(f"audit.log.{len(rotated):03}"))
        if how == "move":
            log_path.rename(rotated[-1])
        else:
            shutil.copyfile(log_path, rotated[-1])
            time.sleep(0.001)
            os.truncate(log_path, 0)
    log.close()
    assert len(rotated) >= 2
    everything = b"".join(path.read_bytes() for path in (*rotated, log_path))
    for number in range(NUM_THREADS * NUM_EVENTS):
        assert b'"req_%d"' % number in everything
    assert verify([log_path], keys).findings == []
    if how == "move":
        report = verify([*rotated, log_path], keys)
        assert (report.findings, report.num_lines) == ([], NUM_THREADS * NUM_EVENTS)


async def test_a_forged_file_in_the_logs_place_ends_nothing(log: AuditLog, log_path: Path) -> None:
    """It is looked at while nothing is written, too, and the thread must outlive that."""
    log.record(event(1))
    await until(lambda: log_path.exists() and records(log_path))
    sealed = b'{"kind":"file",not JSON,"prev":"%s","mac":"%s"' % (b"0" * 64, b"0" * 64)
    digest = hashlib.sha256(sealed).hexdigest().encode()
    log_path.rename(log_path.with_suffix(".moved"))
    log_path.write_bytes(sealed + b',"digest":"%s"}\n' % digest)
    await until(lambda: not log.healthy)
    log_path.rename(log_path.with_suffix(".forged"))
    await until(lambda: log.healthy)
    async with patience():
        await log.record_admin(event(2))
    assert [line["request_id"] for line in records(log_path) if "request_id" in line] == ["req_2"]


async def test_nothing_unforeseen_ends_the_thread(
    log: AuditLog, log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: AuditFile) -> None:
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(AuditFile, "sync", fail)
        await until(lambda: not log.healthy)
    async with patience():
        await log.record_admin(event(1))
    assert log.healthy
    assert [line["request_id"] for line in records(log_path)] == ["req_1"]
