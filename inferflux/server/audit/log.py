"""AuditLog: takes events at any speed and writes them in a thread of its own.

`record` never waits: events queue up to a bound, and what does not fit, or cannot be written, is counted and, once the
log works again, noted in it. `record_admin` waits until the event is on the disk. Knows no HTTP.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, NamedTuple

from inferflux.errors import ConfigError
from inferflux.server.audit.errors import AuditError
from inferflux.server.audit.event import AuditEvent, OmittedRequests, record_of
from inferflux.server.audit.file import AuditFile, Record, timestamp
from inferflux.server.audit.keys import AuditKeys

logger = logging.getLogger(__name__)

MAX_QUEUED: Final = 8192
MAX_QUEUED_CHARS: Final = 64 * 2**20
TICK_S: Final = 1.0
_LOG_AGAIN_S: Final = 60.0

OnResult = Callable[[int, int], None]
"""Called with the numbers of records written and dropped; from any thread."""


class _Entry(NamedTuple):
    """done: set when the event is on the disk, if anyone waits for that."""

    event: AuditEvent | OmittedRequests
    time: float
    done: Future[None] | None


class AuditLog:
    """One log. healthy: the last write worked. num_dropped: events that are not in the log and never will be."""

    def __init__(
        self,
        path: Path,
        keys: AuditKeys,
        *,
        with_text: bool = False,
        on_result: OnResult = lambda written, dropped: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.healthy = True
        self.num_written = 0
        self.num_dropped = 0
        self._path = path
        self._keys = keys
        self._with_text = with_text
        self._on_result = on_result
        self._clock = clock
        self._file = AuditFile(path, keys, clock)
        self._queue: deque[_Entry] = deque()
        self._queued_chars = 0
        self._not_noted = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._logged_at = float("-inf")

    def start(self) -> None:
        """Opens the file. Raises ConfigError when it cannot be used."""
        try:
            self._file.follow()
        except (AuditError, OSError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise ConfigError(f"logging.audit_log: {self._path}: {reason}") from error
        self._thread.start()

    def record(self, event: AuditEvent | OmittedRequests) -> bool:
        """Queues an event and returns at once. False: there is no room, and it is counted as dropped."""
        return self._put(_Entry(event, self._clock(), None))

    async def record_admin(self, event: AuditEvent) -> None:
        """Returns when the event is on the disk. Raises AuditError when it cannot be written: then the change it speaks
        of must not be made."""
        done: Future[None] = Future()
        if not self._put(_Entry(event, self._clock(), done)):
            raise AuditError("the audit log cannot take more records at the moment")
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """Writes what is queued, flushes it to the disk and ends the thread. Blocks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _put(self, entry: _Entry) -> bool:
        with self._wake:
            num_chars = entry.event.num_chars
            room = len(self._queue) < MAX_QUEUED and self._queued_chars + num_chars <= MAX_QUEUED_CHARS
            if (room or not self._queue) and not self._closing:
                self._queue.append(entry)
                self._queued_chars += num_chars
                if len(self._queue) == 1:
                    self._wake.notify()
                return True
            self._count_dropped(1)
        self._on_result(0, 1)
        return False

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._queue and not self._closing:
                    self._wake.wait(TICK_S)
                entries = tuple(self._queue)
                self._queue.clear()
                self._queued_chars = 0
                closing = self._closing
            if entries or not (self.healthy or closing):
                self._write(entries)
            elif closing:
                self._tidy(self._file.close)
                return
            else:
                self._tidy(self._sync)

    def _write(self, entries: Sequence[_Entry]) -> None:
        """Writes the entries. With none, finds out whether writing works again."""
        waiting = [entry.done for entry in entries if entry.done and entry.done.set_running_or_notify_cancel()]
        num_missing = self._not_noted
        try:
            records = [record_of(entry.event, entry.time, self._keys, with_text=self._with_text) for entry in entries]
            if num_missing:
                fields = {"time": timestamp(self._clock()), "count": num_missing}
                records.insert(0, Record("dropped", fields))
            self._file.append(records, durable=not entries or bool(waiting))
        except Exception as error:  # whatever it is, the thread must live on and those who wait must hear of it
            self._fail(error, len(entries))
            for done in waiting:
                done.set_exception(AuditError("the audit log cannot be written"))
            return
        with self._wake:
            self._not_noted -= num_missing
        self.num_written += len(entries)
        self._recover()
        self._on_result(len(entries), 0)
        for done in waiting:
            done.set_result(None)

    def _sync(self) -> None:
        """Nothing has come for a moment: flushes the file, and goes along with a rotation."""
        self._file.follow()
        self._file.sync()

    def _tidy(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # as in `_write`: without the thread, whoever waits for a record waits for ever
            self._fail(error, 0)

    def _fail(self, error: Exception, num_dropped: int) -> None:
        expected = isinstance(error, AuditError | OSError)
        now = time.monotonic()
        if self.healthy or now - self._logged_at > _LOG_AGAIN_S:
            self._logged_at = now
            trace = None if expected else error
            logger.error("the audit log %s cannot be written: %s", self._path, error, exc_info=trace)
        self.healthy = False
        with self._wake:
            self._count_dropped(num_dropped)
        self._on_result(0, num_dropped)

    def _recover(self) -> None:
        if not self.healthy:
            logger.warning("the audit log %s works again; %d records are missing", self._path, self.num_dropped)
        self.healthy = True

    def _count_dropped(self, count: int) -> None:
        self.num_dropped += count
        self._not_noted += count
