"""UnauthenticatedRequests: limits the audit lines of requests without valid credentials, so that they cannot fill a
disk.

Lines per minute are limited per address and in total. Further requests are counted, and the count is a line of its own,
so that none is dropped silently. Knows no HTTP; lives on one event loop.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from inferflux.server.access.attempts import source_of
from inferflux.server.access.bucket import Bucket, BucketTable
from inferflux.server.audit.event import AuditEvent, OmittedRequests
from inferflux.server.audit.log import AuditLog

LINES_PER_MINUTE: Final = 60
LINES_PER_MINUTE_OF_ALL: Final = 600
MAX_SOURCES: Final = 4096
# From the first request without a line to the line with their count.
COUNT_AFTER_S: Final = 60.0


class UnauthenticatedRequests:
    """One per server. log: None when there is no audit log. clock: monotonic seconds."""

    def __init__(self, log: AuditLog | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._sources: BucketTable[str] = BucketTable(MAX_SOURCES)
        self._all = Bucket(LINES_PER_MINUTE_OF_ALL, clock())
        self._omitted: Counter[int] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def record(self, event: AuditEvent) -> None:
        """Records a request that has ended, with a line of its own unless there were too many recently."""
        if self._log is None:
            return
        if self._take(source_of(event.address or "")):
            self._log.record(event)
            return
        self._omitted[event.status] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COUNT_AFTER_S, self.write_count)

    def write_count(self) -> None:
        """Records how many requests had no line since the last such record, if any; also called when the server
        ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._log is not None and self._omitted and self._log.record(OmittedRequests(dict(self._omitted))):
            self._omitted.clear()

    def _take(self, source: str) -> bool:
        now = self._clock()
        self._all.advance(LINES_PER_MINUTE_OF_ALL, now)
        bucket = self._sources.get(source, LINES_PER_MINUTE, now)
        if not bucket.hold(1):
            return False
        if not self._all.hold(1):
            bucket.release(1)
            return False
        bucket.spend(1, now)
        self._all.spend(1, now)
        return True
