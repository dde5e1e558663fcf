"""FileTier: the page file and its health. Opens it, turns itself off when it fails, and tries again.

`store` and `load` are for worker threads and never raise; all else is called by the engine's thread and never waits for
the disk. The state goes from on to off when the file fails, from on to full when the disk has no more space (its pages
stay in use), and back when a later try succeeds, after pauses that double; `changes` has each change. Knows no page's
owner.
"""

import errno
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from inferflux.engine.kv.store.page_file import DamagedPageError, Layout, PageFile, open_page_file
from inferflux.engine.step import FileChange

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

MoveError = Literal["damaged", "io"]


class FileTier:
    """One rank's file.

    path: the file, or a folder, for a file named after the layout. keep: its pages outlive this process; else a file
    found there is emptied, and removed at the end. clock: monotonic seconds.
    """

    def __init__(self, path: Path, layout: Layout, max_bytes: int, *, keep: bool, clock: Callable[[], float]) -> None:
        self.path = path / f"{layout.name.hex()[:16]}.kv" if path.is_dir() else path
        self.changes: queue.SimpleQueue[FileChange] = queue.SimpleQueue()
        self._layout = layout
        self._max_bytes = max_bytes
        self._keep = keep
        self._clock = clock
        self._lock = threading.Lock()
        self._file: PageFile | None = None
        self._users: dict[PageFile, int] = {}
        self._is_full = False
        self._was_opened = False
        self._is_closed = False
        # Pages were forgotten, but the header on the disk is not written yet.
        self._is_header_due = False
        self._retry_at = clock()
        self._pause_s = FIRST_PAUSE_S

    @property
    def may_open(self) -> bool:
        """True when it is off, and it is time to try again."""
        return self._file is None and self._clock() >= self._retry_at

    def offer_again(self) -> None:
        """If it was full, and it is time to try again, offers all of its slots."""
        file = self._file
        if self._is_full and file is not None and self._clock() >= self._retry_at:
            self._is_full = False
            self.changes.put(FileChange("on", file.num_slots))

    def open(self) -> None:
        """Opens the file; for a worker thread, while no move is under way."""
        try:
            file = open_page_file(self.path, self._layout, self._max_bytes)
        except OSError as error:
            self._turn_off(None, error)
            return
        try:
            # What this process wrote before the file failed is still valid.
            found = file.begin(self._keep or self._was_opened)
        except OSError as error:
            file.close()
            self._turn_off(None, error)
            return
        self._was_opened = True
        with self._lock:
            if self._is_closed:
                self._end(file)
                return
            self._file, self._is_full = file, False
            if self._is_header_due:
                file.forget()
                found = found._replace(pages=[])
        num_pages, num_foreign = len(found.pages), found.num_foreign
        logger.info(
            "KV file %s is on: room for %d pages, %d found, %d of another model dropped",
            self.path, file.num_slots, num_pages, num_foreign,
        )  # fmt: skip
        self.changes.put(FileChange("on", file.num_slots, found.pages, num_foreign))
        self._write_header()

    def store(self, slot: int, name: bytes, page: memoryview) -> MoveError | None:
        """Writes a page; returns what went wrong."""
        with self._borrow() as file:
            if file is None:
                return "io"
            try:
                file.write(slot, name, page)
            except OSError as error:
                if error.errno in _NO_SPACE and slot >= file.num_allocated:
                    self._turn_full(file, error)
                else:
                    self._turn_off(file, error)
                return "io"
        # A page was stored: the next failure starts with the first pause again.
        self._pause_s = FIRST_PAUSE_S
        return None

    def load(self, slot: int, name: bytes, page: memoryview) -> MoveError | None:
        """Fills `page`; returns what went wrong."""
        with self._borrow() as file:
            if file is None:
                return "io"
            try:
                file.read(slot, name, page)
            except DamagedPageError as error:
                logger.warning("KV file %s: %s; its tokens are computed again", self.path, error)
                return "damaged"
            except OSError as error:
                self._turn_off(file, error)
                return "io"
        return None

    def forget(self) -> Callable[[], None]:
        """Forgets every page at once and, if it is off, the pages that will be found there. Returns a function for a
        worker thread that makes this durable."""
        with self._lock:
            if self._file is not None:
                self._file.forget()
            self._is_header_due = True
        return self._write_header

    def close(self) -> None:
        """Closes the file, unless a call to it hangs; without `keep` removes it."""
        self._write_header()
        with self._lock:
            self._is_closed = True
            file, self._file = self._file, None
            if file is None and self._was_opened and not self._keep:
                # It is off. Remove what this process left there, unless another one has locked it by now.
                with suppress(OSError):
                    file = open_page_file(self.path, self._layout, self._max_bytes)
            if file is not None:
                self._end(file)

    def _end(self, file: PageFile) -> None:
        """With the lock held: closes the file where no call to it is under way, and removes it where it is not kept."""
        if not self._users.get(file):
            file.close()
        if not self._keep:
            self.path.unlink(missing_ok=True)

    def _write_header(self) -> None:
        with self._borrow() as file:
            if file is not None and self._is_header_due:
                # Before it is written: whoever forgets meanwhile has it written once more.
                self._is_header_due = False
                try:
                    file.write_header()
                except OSError as error:
                    self._is_header_due = True
                    self._turn_off(file, error)

    @contextmanager
    def _borrow(self) -> Iterator[PageFile | None]:
        """Yields the file, which stays open meanwhile; None when the tier is off."""
        with self._lock:
            file = self._file
            if file is not None:
                self._users[file] = self._users.get(file, 0) + 1
        try:
            yield file
        finally:
            if file is not None:
                self._give_back(file)

    def _give_back(self, file: PageFile) -> None:
        with self._lock:
            self._users[file] -= 1
            if not self._users[file]:
                del self._users[file]
                if file is not self._file:
                    file.close()

    def _turn_off(self, file: PageFile | None, error: OSError) -> None:
        """Stops using `file` (None: it could not be opened). The last of its users closes it."""
        with self._lock:
            if file is not self._file:
                return
            self._file = None
            self._plan_retry()
        hint = "another process uses it" if error.errno == errno.EWOULDBLOCK else error.strerror or str(error)
        logger.warning("KV file %s is off: %s; next try in %.0f s", self.path, hint, self._retry_at - self._clock())
        self.changes.put(FileChange("off", 0))

    def _turn_full(self, file: PageFile, error: OSError) -> None:
        with self._lock:
            if file is not self._file or self._is_full:
                return
            self._is_full = True
            self._plan_retry()
        logger.warning("KV file %s is full at %d pages: %s", self.path, file.num_allocated, error.strerror)
        self.changes.put(FileChange("full", file.num_allocated))

    def _plan_retry(self) -> None:
        self._retry_at = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
