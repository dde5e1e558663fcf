"""PageFile: pages on disk, each in a slot of its own and each proving what it is.

    header (4096 bytes)  magic, format version, page bytes, layout name, generation, checksum
    slot 0, 1, ...       a page's bytes, then its record: magic, checksum, generation, sequence, name

A slot is one span, written and read by one call. The checksum (CRC-32C) covers name, generation, sequence and bytes, so
whatever was torn, overwritten, misplaced or damaged is recognised when it is read, and there is no index that could be
lost: it is put together from the records. Raising the generation forgets all pages at once. Space is set aside in
large pieces as it is first needed. The file is locked as long as it is open.

Blocking calls for worker threads; knows no tier, no books and no tensors. Raises OSError as the system does.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np

Buffer = memoryview | bytes | bytearray

ALIGNMENT: Final = 4096
# Set aside at once: large enough to be one extent, small enough to leave a crowded disk alone.
GROWTH_BYTES: Final = 64 * 2**20

_MAGIC: Final = b"IFLUXKV\n"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQ32sQ")
_RECORD_MAGIC: Final = b"PAGE"
_RECORD: Final = struct.Struct("<4sIQQ32s")
_CHECKSUM: Final = struct.Struct("<I")
_COUNTS: Final = struct.Struct("<QQ")


class DamagedPageError(Exception):
    """The slot does not hold the page that was asked for, whole."""


class Layout(NamedTuple):
    """What makes two files interchangeable. name: 32 bytes that name the model, the page's shape and the rank."""

    page_bytes: int
    name: bytes

    @property
    def slot_bytes(self) -> int:
        return -(-(self.page_bytes + _RECORD.size) // ALIGNMENT) * ALIGNMENT


class Found(NamedTuple):
    """pages: slot and name of every page, least recently written first. num_foreign: slots of another layout's."""

    pages: list[tuple[int, bytes]]
    num_foreign: int


class PageFile:
    """An open, locked file. `read` and `write` may be called by several threads, for different slots at a time."""

    def __init__(self, fd: int, layout: Layout, num_slots: int) -> None:
        self.num_slots = num_slots
        self._fd = fd
        self._layout = layout
        self._lock = threading.Lock()
        # Of two that write the header the one that knows more comes last.
        self._header_turn = threading.Lock()
        self._generation = 1
        self._sequence = 0
        self._num_allocated = 0

    @property
    def num_allocated(self) -> int:
        """Slots that have their place on the disk."""
        return self._num_allocated

    def write(self, slot: int, name: bytes, page: Buffer) -> None:
        """Writes a page and its record."""
        with self._lock:
            self._allocate(slot)
            self._sequence += 1
            generation, sequence = self._generation, self._sequence
        checksum = _checksum(name, generation, sequence, page)
        record = _RECORD.pack(_RECORD_MAGIC, checksum, generation, sequence, name)
        write_at(self._fd, (page, record), self._offset(slot))

    def read(self, slot: int, name: bytes, page: memoryview) -> None:
        """Fills `page`. Raises DamagedPageError unless the slot holds the page of that name, whole."""
        record = bytearray(_RECORD.size)
        if not read_at(self._fd, (page, memoryview(record)), self._offset(slot)):
            raise DamagedPageError(f"slot {slot} ends early")
        magic, checksum, generation, sequence, written_name = _RECORD.unpack(record)
        if (magic, generation, written_name) != (_RECORD_MAGIC, self._generation, name):
            raise DamagedPageError(f"slot {slot} holds another page")
        if checksum != _checksum(name, generation, sequence, page):
            raise DamagedPageError(f"slot {slot} has a wrong checksum")

    def forget(self) -> None:
        """Makes every page in it unreadable from now on, at once; `write_header` makes it last."""
        with self._lock:
            self._generation += 1

    def write_header(self) -> None:
        """Writes the header that says what the file is."""
        with self._header_turn:
            fields = _HEADER.pack(_MAGIC, _VERSION, 0, *self._layout, self._generation)
            header = fields + _CHECKSUM.pack(google_crc32c.value(fields))
            write_at(self._fd, (header.ljust(ALIGNMENT, b"\0"),), 0)

    def close(self) -> None:
        """Closes and unlocks it. No other call may be under way or follow."""
        os.close(self._fd)

    def begin(self, keep: bool) -> Found:
        """Makes the file usable: with `keep` and a header that fits, returns what is in it; else it starts empty."""
        size = os.fstat(self._fd).st_size
        num_present = max(0, size - ALIGNMENT) // self._layout.slot_bytes
        generation = self._read_generation()
        if keep and generation is not None:
            self._generation = generation
            self._num_allocated = min(num_present, self.num_slots)
            found = sorted(self._records())
            self._sequence = found[-1][0] if found else 0
            return Found([(slot, name) for _, slot, name in found], 0)
        os.ftruncate(self._fd, 0)
        self.write_header()
        return Found([], num_present if keep else 0)

    def _read_generation(self) -> int | None:
        """Returns the header's generation; None when it is not this layout's."""
        header = bytearray(_HEADER.size + _CHECKSUM.size)
        if not read_at(self._fd, (memoryview(header),), 0):
            return None
        fields = bytes(header[: _HEADER.size])
        magic, version, _, page_bytes, name, generation = _HEADER.unpack(fields)
        fits = (magic, version, page_bytes, name) == (_MAGIC, _VERSION, *self._layout)
        whole = _CHECKSUM.unpack(header[_HEADER.size :]) == (google_crc32c.value(fields),)
        return int(generation) if fits and whole else None

    def _records(self) -> Iterator[tuple[int, int, bytes]]:
        """Yields sequence, slot and name of every page that seems to be there; reading it will tell."""
        record = bytearray(_RECORD.size)
        for slot in range(self._num_allocated):
            if not read_at(self._fd, (memoryview(record),), self._offset(slot) + self._layout.page_bytes):
                return
            magic, _, generation, sequence, name = _RECORD.unpack(record)
            if magic == _RECORD_MAGIC and generation == self._generation:
                yield sequence, slot, name

    def _allocate(self, slot: int) -> None:
        if slot < self._num_allocated:
            return
        slot_bytes = self._layout.slot_bytes
        end = min(self.num_slots, max(slot + 1, self._num_allocated + GROWTH_BYTES // slot_bytes))
        allocate(self._fd, self._offset(self._num_allocated), (end - self._num_allocated) * slot_bytes)
        self._num_allocated = end

    def _offset(self, slot: int) -> int:
        return ALIGNMENT + slot * self._layout.slot_bytes


def open_page_file(path: Path, layout: Layout, max_bytes: int) -> PageFile:
    """Opens or creates the file, and the folder it is in, for this process alone; `begin` is to follow.

    Raises OSError, EWOULDBLOCK when another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return PageFile(fd, layout, max(0, max_bytes - ALIGNMENT) // layout.slot_bytes)


def read_at(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """Fills the buffers from `offset` on; False when the file ends before."""
    wanted = sum(map(len, buffers))
    count = os.preadv(fd, buffers, offset)
    while 0 < count < wanted:
        more = os.preadv(fd, _rest(buffers, count), offset + count)
        if not more:
            break
        count += more
    return count == wanted


def write_at(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Writes all of the buffers at `offset`."""
    wanted = sum(map(len, buffers))
    count = os.pwritev(fd, buffers, offset)
    while count < wanted:
        more = os.pwritev(fd, _rest(buffers, count), offset + count)
        if not more:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        count += more


def allocate(fd: int, offset: int, num_bytes: int) -> None:
    """Sets space aside, so that later writes to it find some; macOS cannot, there the file only becomes longer."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, offset, num_bytes)
    elif os.fstat(fd).st_size < offset + num_bytes:
        os.ftruncate(fd, offset + num_bytes)


def _rest(buffers: Sequence[Buffer], count: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        view = memoryview(buffer)
        rest.append(view[min(count, len(view)) :])
        count = max(0, count - len(view))
    return [view for view in rest if view]


def _checksum(name: bytes, generation: int, sequence: int, page: Buffer) -> int:
    """CRC-32C: 22 GB/s with the CPU's instruction, where SHA-256 has 1.6 and zlib's CRC-32 2.8 (pages of 360 KiB, one
    core of a Sapphire Rapids Xeon)."""
    # It takes arrays, but no memoryviews that could be written to.
    data: Any = np.frombuffer(page, np.uint8)
    return int(google_crc32c.extend(google_crc32c.value(name + _COUNTS.pack(generation, sequence)), data))
