"""How an audit file on the disk begins and ends: what a writer must know to go on with it. Only reads."""

import contextlib
import glob
import os
from pathlib import Path
from typing import Final, NamedTuple

from inferflux.server.audit.errors import AuditError
from inferflux.server.audit.keys import AuditKeys
from inferflux.server.audit.lines import GENESIS, HEADER_KIND, parse_line

_MAX_HEADER_BYTES: Final = 1024
_TAIL_BYTES: Final = 65_536
_MAX_TAIL_BYTES: Final = 256 * 2**20
_HEADER_START: Final = b'{"kind":"file",'


class Tail(NamedTuple):
    """head: what the next line must name as the one before it. rest: what follows the last sound line and its line
    feed; empty when all is well."""

    head: str
    rest: bytes


def has_header(descriptor: int, size: int, keys: AuditKeys, path: Path) -> bool:
    """False when all there is is a header that a crash cut short.

    Raises AuditError for a file that is no audit log, or was written with another key.
    """
    start = os.pread(descriptor, _MAX_HEADER_BYTES, 0)
    line, ended, _ = start.partition(b"\n")
    if not ended and len(start) == size and (start.startswith(_HEADER_START) or _HEADER_START.startswith(start)):
        return False
    header = parse_line(line)
    if header is None or header.kind != HEADER_KIND:
        raise AuditError(f"{path}: not an audit log, or changed; move it away to start a new one")
    if header.fields().get("key_id") != keys.id or not header.is_authentic(keys):
        raise AuditError(f"{path}: written with another key; restore that key or move the log away")
    return True


def read_tail(descriptor: int, size: int, path: Path) -> Tail:
    """Returns how the file ends. Raises AuditError when there is no sound line anywhere near."""
    num_bytes = _TAIL_BYTES
    while True:
        offset = max(0, size - num_bytes)
        found = _last_line(_read(descriptor, offset, size - offset), whole=offset == 0)
        if found is not None:
            return found
        if offset == 0 or num_bytes >= _MAX_TAIL_BYTES:
            raise AuditError(f"{path}: has no valid line near its end; move it away to start a new one")
        num_bytes *= 8


def head_before(path: Path, keys: AuditKeys) -> str:
    """Returns the digest of the last line that was written before the file at `path` was begun: that of the newest
    rotated one beside it (audit.log.1, audit.log-20250131) that was written with this key; GENESIS when there is none.
    """
    rotated = []
    for neighbour in path.parent.glob(glob.escape(path.name) + "[.-]*"):
        with contextlib.suppress(OSError):
            rotated.append((neighbour.stat().st_mtime_ns, neighbour))
    for _, neighbour in sorted(rotated, reverse=True):
        with contextlib.suppress(OSError, AuditError):
            return _head_of(neighbour, keys)
    return GENESIS


def _head_of(path: Path, keys: AuditKeys) -> str:
    """Returns the digest of a file's last line. Raises AuditError for what is no log of this key's, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if not has_header(descriptor, size, keys, path):
            raise AuditError(f"{path}: has no line")
        head, rest = read_tail(descriptor, size, path)
        last = parse_line(rest)  # a crash may have kept no more than the line feed back
        return head if last is None else last.head
    finally:
        os.close(descriptor)


def _last_line(content: bytes, *, whole: bool) -> Tail | None:
    """whole: `content` is the whole file, else its end, which may begin within a line."""
    end = content.rfind(b"\n")
    while end >= 0:
        start = content.rfind(b"\n", 0, end) + 1
        parsed = parse_line(content[start:end]) if start or whole else None
        if parsed is not None:
            return Tail(parsed.head, content[end + 1 :])
        end = start - 1
    return None


def _read(descriptor: int, offset: int, num_bytes: int) -> bytes:
    pieces = []
    while num_bytes and (piece := os.pread(descriptor, num_bytes, offset)):
        pieces.append(piece)
        offset += len(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)
