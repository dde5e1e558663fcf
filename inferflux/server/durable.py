"""Durable files: written whole or not at all, on the disk before the write returns, by one process at a time.

Knows bytes and paths, nothing of policies. Works on POSIX systems.
"""

import contextlib
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

PRIVATE_MODE: Final = 0o600
MAX_BYTES: Final = 64 * 1024 * 1024


class LockedError(Exception):
    """Another process holds the lock; `holder` is its process id as it wrote it down, perhaps empty."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"locked by process {holder}")
        self.holder = holder


def real_file(path: Path) -> Path:
    """Returns the file that a symbolic link leads to. Replacing the link itself would leave the linked file, perhaps on
    the only persistent volume, as it was; and each name would have a lock of its own."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_file(path: Path, content: bytes) -> None:
    """Replaces `path` by a file of mode 0600 with this content; when it returns, a power cut leaves the new content.

    The content goes into a temporary file beside it, which is flushed to the disk and renamed, and then the folder is
    flushed. Two processes must not do this to one path at once. Raises OSError: then the path holds the old content
    or the new one, never a part.
    """
    temporary = path.with_name(path.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        _write_new(temporary, content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Flushes the folder that `path` is in, so that names made, renamed or removed in it last. Raises OSError."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_file(path: Path) -> bytes | None:
    """Returns the content; None when there is no such file. Raises OSError, also for what is no regular file or too
    large to be one of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"larger than {MAX_BYTES} bytes")
    return content


def make_private(path: Path) -> bool:
    """Takes all rights on the file away from group and others; True when they had any. Raises OSError."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return False
    path.chmod(PRIVATE_MODE)
    return True


class Lock:
    """An exclusive lock (flock) on a file of its own, held until closed or until the process ends, however it ends.

    The file stays: whoever removed it could lock a second one of the same name.
    """

    def __init__(self, path: Path) -> None:
        """Raises LockedError when another process holds it, OSError when the file cannot be opened."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_MODE)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 20).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            raise LockedError(holder) from None
        except OSError:
            os.close(self._descriptor)
            raise
        # For people only; a full disk is no reason not to hold the lock.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def close(self) -> None:
        os.close(self._descriptor)


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_MODE)
    try:
        os.fchmod(descriptor, PRIVATE_MODE)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
