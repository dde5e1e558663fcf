"""AuditFile: appends lines to the audit log's file through rotations, crashes and full disks.

After a `move` rotation lines go to the new file at the path, as they do when that was while no server ran. After
`copytruncate` the lines of the last seconds are written once more, since those that came between the copying and the
truncating are in no file; the verifier knows such repeats. A failed append leaves the file as it was. Blocks; called by
one thread at a time.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferflux.server.audit.errors import AuditError
from inferflux.server.audit.keys import AuditKeys
from inferflux.server.audit.lines import GENESIS, TORN_KIND, make_header, make_line, parse_line
from inferflux.server.audit.tail import has_header, head_before, read_tail
from inferflux.server.durable import PRIVATE_MODE, sync_folder

logger = logging.getLogger(__name__)

REPEAT_S: Final = 10.0
REPEAT_BYTES: Final = 4 * 2**20


class Record(NamedTuple):
    """One line's kind and members."""

    kind: str
    fields: Mapping[str, Any]


class _Batch(NamedTuple):
    """Lines written together. time: monotonic seconds. prev: what the first names as the one before it."""

    time: float
    prev: str
    data: bytes


class AuditFile:
    """One log. `follow` opens it; then `append` as often as needed, `follow` now and then, and `close`.

    While it is open, `_size` is the file's size as far as it is ours; a failed write goes back to it.
    """

    def __init__(self, path: Path, keys: AuditKeys, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._keys = keys
        self._clock = clock
        self._descriptor: int | None = None
        self._size = 0
        self._head = GENESIS
        self._recent: deque[_Batch] = deque()
        self._recent_bytes = 0

    def append(self, records: Sequence[Record], *, durable: bool) -> None:
        """Appends the records; durable: when it returns, a power cut leaves them there.

        Raises AuditError, OSError: then none of them is in the file.
        """
        descriptor = self.follow()
        lines, head = [], self._head
        for record in records:
            line, head = make_line(record.kind, record.fields, head, self._keys)
            lines.append(line)
        data = b"".join(lines)
        self._write(descriptor, data, durable=durable)
        self._remember(data)
        self._head = head
        self._check_size(descriptor)

    def follow(self) -> int:
        """Opens the file, or goes along with a rotation if there was one; returns the descriptor.

        Raises AuditError, OSError.
        """
        if self._descriptor is not None and self._is_moved(self._descriptor):
            self._leave()
        if self._descriptor is None:
            self._descriptor = self._open()
        self._check_size(self._descriptor)
        return self._descriptor

    def sync(self) -> None:
        """Flushes what was appended to the disk. Raises OSError."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Flushes and closes the file. Raises AuditError, OSError."""
        if self._descriptor is not None:
            try:
                self.follow()
                self.sync()
            finally:
                self._drop()

    def _open(self) -> int:
        """Opens the file, made if need be, and finds the end of its chain."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        try:
            self._lock(descriptor)
            self._size = os.fstat(descriptor).st_size
            if self._size and has_header(descriptor, self._size, self._keys, self._path):
                self._resume(descriptor)
            else:
                self._begin(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _lock(self, descriptor: int) -> None:
        """Two processes that write to one file would break each other's chain."""
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AuditError(f"{self._path}: must be a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AuditError(f"{self._path}: another process writes to it") from None

    def _begin(self, descriptor: int) -> None:
        """Writes the header of an empty file, and after a truncation the lines to repeat."""
        os.ftruncate(descriptor, 0)
        self._size = 0
        if self._head == GENESIS:
            self._head = head_before(self._path, self._keys)
        prev = self._recent[0].prev if self._recent else self._head
        header = make_header(prev, timestamp(self._clock()), self._keys)
        self._write(descriptor, header + b"".join(batch.data for batch in self._recent), durable=True)
        sync_folder(self._path)

    def _resume(self, descriptor: int) -> None:
        """Goes on after the last sound line, and puts on record what a crash left half written behind it."""
        self._head, rest = read_tail(descriptor, self._size, self._path)
        if rest.endswith(b"\n"):
            logger.error("audit log %s: its last lines have been changed", self._path)
        elif (last := parse_line(rest)) is not None:
            self._write(descriptor, b"\n")
            self._head = last.head
        elif rest:
            logger.warning("audit log %s: a crash left half a line (%d bytes); it is kept", self._path, len(rest))
            fields = {"time": timestamp(self._clock()), "bytes": len(rest), "sha256": hashlib.sha256(rest).hexdigest()}
            line, head = make_line(TORN_KIND, fields, self._head, self._keys)
            self._write(descriptor, b"\n" + line)
            self._remember(rest + b"\n" + line)
            self._head = head

    def _is_moved(self, descriptor: int) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return True

    def _leave(self) -> None:
        """The file was moved away; what was written to it is safe there."""
        self.sync()
        self._drop()
        self._recent.clear()
        self._recent_bytes = 0

    def _check_size(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size < self._size:
            # Only lines of ours can have come since the truncation, and all of them are among those to repeat.
            self._begin(descriptor)
        elif size > self._size:
            logger.error("audit log %s: another process has written to it", self._path)
            self._drop()
            self._descriptor = self._open()

    def _write(self, descriptor: int, data: bytes, *, durable: bool = False) -> None:
        """Appends all of the data; or nothing, raising OSError, and then the file is closed and opened again."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if durable:
                os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_size > self._size:
                    os.ftruncate(descriptor, self._size)
            self._drop()
            raise
        self._size += len(data)

    def _remember(self, data: bytes) -> None:
        now, recent = time.monotonic(), self._recent
        recent.append(_Batch(now, self._head, data))
        self._recent_bytes += len(data)
        while len(recent) > 1 and (self._recent_bytes > REPEAT_BYTES or recent[0].time < now - REPEAT_S):
            self._recent_bytes -= len(recent.popleft().data)

    def _drop(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def timestamp(seconds: float) -> str:
    """Returns Unix time as `2025-01-31T12:00:00.000+00:00`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
