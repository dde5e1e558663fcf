"""What is not HTTP, in the audit log: no middleware ever sees it, and who it was may matter all the same.

Method and path are unknown. The lines are few, for nonsense costs its sender nothing and must not fill a disk.
"""

import time
from collections.abc import Callable
from typing import Final

from inferflux.server.access.bucket import Bucket
from inferflux.server.audit import AuditEvent, AuditLog

LINES_PER_MINUTE: Final = 60
ROUTE: Final = "unreadable"
DECISION: Final = "denied:unreadable"


class UnreadableRequests:
    """Those of one server. audit: None when there is no audit log. clock: seconds, never going back."""

    def __init__(self, audit: AuditLog | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        self._bucket = Bucket(LINES_PER_MINUTE, clock())

    def note(self, request_id: str, address: str | None, status: int) -> None:
        """Records one that was answered with `status`, unless there were too many of late."""
        now = self._clock()
        self._bucket.advance(LINES_PER_MINUTE, now)
        if self._audit is None or not self._bucket.hold(1):
            return
        self._bucket.spend(1, now)
        self._audit.record(
            AuditEvent(request_id=request_id, route=ROUTE, decision=DECISION, status=status, address=address)
        )
