"""Reservations: memory that models being loaded right now will take, so that two loads do not both count on it.

Each load has a file, locked while it lasts, with the bytes it has reserved; what its process has allocated of these is
used memory already and is subtracted. Shared by all processes of one user on one machine. If such files cannot be
created, loads do not know of each other, which is no error. Knows no model.
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from inferflux.engine.process_memory import resident_bytes

logger = logging.getLogger(__name__)

# A turn takes milliseconds; a process that holds it longer (because it is suspended) is not waited for.
TURN_S: Final = 5.0
_LOCK: Final = "lock"
_PRIVATE: Final = 0o700


def reservations_folder() -> Path:
    """Returns the folder of the files: in memory, so that no other machine sees them and a reboot removes them."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"inferflux-{os.getuid()}"


class Reservation:
    """The reservation of one load, for as long as the context lasts.

    device: whose memory it is, such as `cpu`. folder: where the files are; None: reserves nothing and sees no others,
    as for one of several ranks, which divide the memory among themselves.
    """

    def __init__(self, device: str, folder: Path | None) -> None:
        self._device = device
        self._folder = folder
        self._file: IO[str] | None = None
        self._path = ""
        self._before = 0

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            Path(self._path).unlink(missing_ok=True)
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        """Excludes other loads while the body runs. Yields the bytes that others have reserved and not taken yet."""
        with contextlib.ExitStack() as stack:
            reserved = 0
            if self._folder is not None:
                try:
                    stack.enter_context(_locked(self._folder))
                    reserved = sum(map(self._outstanding, self._folder.glob("*.load")))
                except OSError as error:
                    logger.debug("other loads' memory is not known: %s", error)
            yield reserved

    def reserve(self, num_bytes: int) -> None:
        """Sets what this load will hold in all. Call it within `turn`."""
        if self._folder is None:
            return
        try:
            if self._file is None:
                self._file = self._open(self._folder)
            self._file.seek(0)
            self._file.truncate()
            self._file.write(f"{self._device} {os.getpid()} {num_bytes} {self._before}")
            self._file.flush()
        except OSError as error:
            logger.debug("other loads will not know of this one: %s", error)

    def _open(self, folder: Path) -> IO[str]:
        self._before = resident_bytes(os.getpid()) or 0
        descriptor, self._path = tempfile.mkstemp(suffix=".load", dir=folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return os.fdopen(descriptor, "w")

    def _outstanding(self, path: Path) -> int:
        """Returns what another load has reserved and not taken; 0 for a file that makes no sense. Removes the file of a
        process that died."""
        if str(path) == self._path:
            return 0
        with contextlib.suppress(FileNotFoundError, ValueError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                device, pid, num_bytes, before = file.read().split()
                if device != self._device:
                    return 0
                taken = (resident_bytes(int(pid)) or 0) - int(before) if device == "cpu" else 0
                return max(0, int(num_bytes) - max(0, taken))
            path.unlink(missing_ok=True)
        return 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises OSError when the folder is not ours, or the lock is held for too long."""
    folder.mkdir(mode=_PRIVATE, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not this user's folder")
    deadline = time.monotonic() + TURN_S
    with (folder / _LOCK).open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        yield
