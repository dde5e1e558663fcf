"""The file tier's health: off when the file fails, full when the disk is, and back when a later try succeeds."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferflux.engine.kv.store import file_tier, page_file
from inferflux.engine.kv.store.file_tier import FIRST_PAUSE_S, FileTier
from inferflux.engine.kv.store.page_file import ALIGNMENT, Layout, open_page_file
from inferflux.engine.step import FileChange

LAYOUT = Layout(page_bytes=5000, name=b"m" * 32)
MAX_BYTES = ALIGNMENT + 10 * LAYOUT.slot_bytes
NAME = b"n" * 32
PAGE = memoryview(bytes(range(250)) * 20)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(path: Path, clock: Clock, *, keep: bool = True) -> FileTier:
    return FileTier(path, LAYOUT, MAX_BYTES, keep=keep, clock=clock)


def changes_of(tier: FileTier) -> list[FileChange]:
    changes = []
    while not tier.changes.empty():
        changes.append(tier.changes.get())
    return changes


def failing(code: int) -> Callable[..., Any]:
    def fail(*_args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("operation", ["write_at", "read_at"])
def test_an_io_error_turns_it_off_until_a_later_try(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, operation: str
):
    tier = make(tmp_path / "kv", clock)
    tier.open()
    assert tier.store(2, NAME, PAGE) is None
    assert changes_of(tier) == [FileChange("on", 10, [], 0)]
    buffer = memoryview(bytearray(5000))
    with monkeypatch.context() as patch:
        patch.setattr(page_file, operation, failing(errno.EIO))
        move = tier.store if operation == "write_at" else tier.load
        assert move(2, NAME, buffer) == "io"
        assert (tier.store(3, NAME, PAGE), tier.load(2, NAME, buffer)) == ("io", "io"), "off: nothing is tried"
        assert changes_of(tier) == [FileChange("off", 0)]
        assert not tier.may_open
        clock.now += FIRST_PAUSE_S
        assert tier.may_open
        tier.open()
        clock.now += FIRST_PAUSE_S
        assert not tier.may_open, "the second pause is longer"
    clock.now += FIRST_PAUSE_S
    tier.open()
    change = changes_of(tier)[-1]
    assert change.state == "on"
    assert change.pages == [(2, NAME)]
    assert tier.load(2, NAME, buffer) is None
    assert buffer == PAGE
    tier.close()


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_file, "GROWTH_BYTES", 2 * LAYOUT.slot_bytes)
    tier = make(tmp_path / "kv", clock)
    tier.open()
    assert tier.store(0, NAME, PAGE) is None
    changes_of(tier)
    with monkeypatch.context() as patch:
        patch.setattr(page_file, "allocate", failing(errno.ENOSPC))
        assert tier.store(5, b"o" * 32, PAGE) == "io"
        assert changes_of(tier) == [FileChange("full", 2)]
        assert tier.store(1, b"o" * 32, PAGE) is None, "there is room in what was set aside"
        assert tier.load(0, NAME, memoryview(bytearray(5000))) is None
        tier.offer_again()
        assert changes_of(tier) == []
    clock.now += FIRST_PAUSE_S
    tier.offer_again()
    assert changes_of(tier) == [FileChange("on", 10)]
    assert tier.store(5, b"p" * 32, PAGE) is None
    tier.close()


def test_a_path_that_cannot_be_written_is_no_error_but_off(tmp_path: Path, clock: Clock):
    (tmp_path / "file").touch()
    tier = make(tmp_path / "file" / "kv", clock)
    tier.open()
    assert changes_of(tier) == [FileChange("off", 0)]
    (tmp_path / "file").unlink()
    clock.now += FIRST_PAUSE_S
    tier.open()
    assert changes_of(tier)[-1].state == "on"
    tier.close()


def test_a_file_in_use_is_left_alone_and_taken_over_later(tmp_path: Path, clock: Clock):
    first = open_page_file(tmp_path / "kv", LAYOUT, MAX_BYTES)
    first.begin(keep=True)
    first.write(4, NAME, PAGE)
    tier = make(tmp_path / "kv", clock)
    tier.open()
    assert changes_of(tier) == [FileChange("off", 0)]
    first.close()
    clock.now += FIRST_PAUSE_S
    tier.open()
    assert changes_of(tier) == [FileChange("on", 10, [(4, NAME)], 0)]
    tier.close()


def test_what_is_not_kept_is_emptied_and_removed(tmp_path: Path, clock: Clock):
    for keep in (True, False):
        tier = make(tmp_path / "kv", clock, keep=keep)
        tier.open()
        assert changes_of(tier) == [FileChange("on", 10, [], 0)]
        assert tier.store(0, NAME, PAGE) is None
        tier.close()
        assert (tmp_path / "kv").exists() == keep


def test_a_folder_gets_a_file_named_after_the_layout(tmp_path: Path, clock: Clock):
    tier = make(tmp_path, clock)
    tier.open()
    assert [path.name for path in tmp_path.iterdir()] == ["6d6d6d6d6d6d6d6d.kv"]
    tier.close()


def pages_after(path: Path, clock: Clock) -> list[tuple[int, bytes]] | None:
    """What a process finds that opens the file later."""
    tier = make(path, clock)
    tier.open()
    tier.close()
    return changes_of(tier)[0].pages


def test_what_is_forgotten_while_it_is_off_does_not_come_back(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    tier = make(tmp_path / "kv", clock)
    tier.open()
    assert tier.store(2, NAME, PAGE) is None
    with monkeypatch.context() as patch:
        patch.setattr(page_file, "write_at", failing(errno.EIO))
        assert tier.store(3, NAME, PAGE) == "io"
    tier.forget()()
    clock.now += FIRST_PAUSE_S
    tier.open()
    assert changes_of(tier)[-1] == FileChange("on", 10, [], 0)
    assert tier.store(4, NAME, PAGE) is None
    tier.close()
    assert pages_after(tmp_path / "kv", clock) == [(4, NAME)]


def test_forgetting_again_while_the_header_is_written_lasts(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    tier = make(tmp_path / "kv", clock)
    tier.open()
    again: list[Callable[[], None]] = []
    write_at = page_file.write_at

    def write_and_forget(*args: Any) -> None:
        """The first header is on the disk when a page is stored after it, and all is forgotten once more."""
        monkeypatch.setattr(page_file, "write_at", write_at)
        write_at(*args)
        assert tier.store(2, NAME, PAGE) is None
        again.append(tier.forget())

    monkeypatch.setattr(page_file, "write_at", write_and_forget)
    tier.forget()()
    again[0]()
    tier.close()
    assert pages_after(tmp_path / "kv", clock) == []


def test_an_end_while_it_is_being_opened_leaves_nothing_open(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """Else the next engine in this process would find the file in use."""
    for keep in (True, False):
        tier = make(tmp_path / "kv", clock, keep=keep)

        def open_late(*args: Any, tier: FileTier = tier) -> page_file.PageFile:
            file = open_page_file(*args)
            tier.close()
            return file

        monkeypatch.setattr(file_tier, "open_page_file", open_late)
        tier.open()
        assert changes_of(tier) == []
        assert (tmp_path / "kv").exists() == keep
        open_page_file(tmp_path / "kv", LAYOUT, MAX_BYTES).close()


def test_pages_that_are_not_kept_go_at_the_end_though_the_file_failed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """They may be gigabytes. Not those of another process that uses the file meanwhile."""
    path = tmp_path / "kv"
    for in_use in (True, False):
        tier = make(path, clock, keep=False)
        tier.open()
        with monkeypatch.context() as patch:
            patch.setattr(page_file, "write_at", failing(errno.EIO))
            assert tier.store(2, NAME, PAGE) == "io"
        other = open_page_file(path, LAYOUT, MAX_BYTES) if in_use else None
        tier.close()
        assert path.exists() == in_use
        if other is not None:
            other.close()
