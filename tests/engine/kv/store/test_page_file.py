"""The page file: what is read is what was written under that name, or it is not read at all."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux.engine.kv.store.page_file import ALIGNMENT, DamagedPageError, Layout, PageFile, open_page_file

LAYOUT = Layout(page_bytes=5000, name=b"m" * 32)
MAX_BYTES = ALIGNMENT + 10 * LAYOUT.slot_bytes
NAMES = [bytes([index]) * 32 for index in range(10)]


def page_of(name: bytes) -> bytes:
    return random.Random(name).randbytes(LAYOUT.page_bytes)


def read(file: PageFile, slot: int, name: bytes) -> bytes:
    page = bytearray(LAYOUT.page_bytes)
    file.read(slot, name, memoryview(page))
    return bytes(page)


def open_file(path: Path, layout: Layout = LAYOUT, max_bytes: int = MAX_BYTES) -> PageFile:
    return open_page_file(path, layout, max_bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of ten pages, closed."""
    file = open_file(tmp_path / "folder" / "kv")
    file.begin(keep=True)
    for slot, name in enumerate(NAMES):
        file.write(slot, name, page_of(name))
    file.close()
    return tmp_path / "folder" / "kv"


@pytest.fixture
def file(path: Path) -> Iterator[PageFile]:
    file = open_file(path)
    yield file
    file.close()


def test_pages_come_back_after_a_restart_in_the_order_they_were_written(path: Path):
    file = open_file(path)
    found = file.begin(keep=True)
    assert found == ([(slot, name) for slot, name in enumerate(NAMES)], 0)
    assert [read(file, slot, name) for slot, name in found.pages] == [page_of(name) for name in NAMES]
    file.write(3, b"n" * 32, page_of(b"n" * 32))
    file.close()
    file = open_file(path)
    assert file.begin(keep=True).pages[-1] == (3, b"n" * 32), "written last"
    with pytest.raises(DamagedPageError):
        read(file, 3, NAMES[3])
    file.close()


def test_a_slot_holds_the_page_of_its_name_only(file: PageFile):
    file.begin(keep=True)
    for slot, name in ((0, NAMES[1]), (1, NAMES[0]), (0, b"x" * 32)):
        with pytest.raises(DamagedPageError):
            read(file, slot, name)


def test_every_flipped_bit_is_noticed(path: Path):
    rng = random.Random(0)
    for _ in range(200):
        slot = rng.randrange(10)
        offset = ALIGNMENT + slot * LAYOUT.slot_bytes + rng.randrange(LAYOUT.page_bytes + 56)
        with path.open("r+b") as raw:
            raw.seek(offset)
            (byte,) = raw.read(1)
            raw.seek(offset)
            raw.write(bytes([byte ^ 1 << rng.randrange(8)]))
        file = open_file(path)
        file.begin(keep=True)
        with pytest.raises(DamagedPageError):
            read(file, slot, NAMES[slot])
        file.write(slot, NAMES[slot], page_of(NAMES[slot]))
        assert read(file, slot, NAMES[slot]) == page_of(NAMES[slot])
        file.close()


@pytest.mark.parametrize("size", [0, 10, ALIGNMENT, ALIGNMENT + 3 * LAYOUT.slot_bytes + 4999])
def test_a_truncated_file_keeps_what_is_whole(path: Path, size: int):
    os.truncate(path, size)
    file = open_file(path)
    found = file.begin(keep=True)
    assert len(found.pages) == (3 if size > ALIGNMENT else 0)
    for slot, name in found.pages:
        assert read(file, slot, name) == page_of(name)
    file.write(9, NAMES[9], page_of(NAMES[9]))
    assert read(file, 9, NAMES[9]) == page_of(NAMES[9])
    file.close()


def test_a_file_that_shrinks_while_it_is_open(file: PageFile, path: Path):
    file.begin(keep=True)
    os.truncate(path, ALIGNMENT + LAYOUT.slot_bytes // 2)
    for slot, name in enumerate(NAMES):
        with pytest.raises(DamagedPageError):
            read(file, slot, name)


@pytest.mark.parametrize("layout", [Layout(5000, b"o" * 32), Layout(4000, b"m" * 32)])
def test_another_models_pages_are_dropped_and_counted(path: Path, layout: Layout):
    file = open_file(path, layout)
    pages, num_foreign = file.begin(keep=True)
    assert pages == []
    assert num_foreign >= 10
    file.close()
    file = open_file(path)
    assert file.begin(keep=True).pages == []
    file.close()


def test_a_damaged_header_is_another_models(path: Path):
    with path.open("r+b") as raw:
        raw.seek(20)
        raw.write(b"?")
    file = open_file(path)
    assert file.begin(keep=True).pages == []
    file.close()


def test_forgetting_holds_over_a_restart_and_for_stores_under_way(path: Path):
    file = open_file(path)
    file.begin(keep=True)
    file.forget()
    with pytest.raises(DamagedPageError):
        read(file, 0, NAMES[0])
    file.write_header()
    file.write(1, NAMES[1], page_of(NAMES[1]))
    file.close()
    file = open_file(path)
    assert file.begin(keep=True).pages == [(1, NAMES[1])]
    file.close()


def test_more_room_keeps_the_pages_and_less_keeps_what_fits(path: Path):
    for num_slots, num_kept in ((20, 10), (4, 4)):
        file = open_file(path, max_bytes=ALIGNMENT + num_slots * LAYOUT.slot_bytes)
        assert file.num_slots == num_slots
        assert len(file.begin(keep=True).pages) == num_kept
        file.close()


def test_a_second_opener_is_refused(file: PageFile, path: Path):
    with pytest.raises(BlockingIOError):
        open_file(path)


def test_fifty_killed_writers_leave_a_usable_file(tmp_path: Path):
    command = [sys.executable, "-m", "tests.support.crash_writer", str(tmp_path / "kv"), "50", "100"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 100


def test_a_system_that_sets_no_space_aside_keeps_pages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """macOS has no posix_fallocate: the tier ended the engine there."""
    monkeypatch.delattr(os, "posix_fallocate")
    file = open_file(tmp_path / "kv")
    file.begin(keep=True)
    for slot, name in enumerate(NAMES):
        file.write(slot, name, page_of(name))
    file.begin(keep=True)
    assert [read(file, slot, name) for slot, name in enumerate(NAMES)] == [page_of(name) for name in NAMES]
    file.close()
