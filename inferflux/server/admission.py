"""Admission: how many requests run at once, how many wait for a turn, and when the next is turned away.

Counts HTTP requests that generate; how their sequences share the engine is the scheduler's work. First come, first
served. Lives on one event loop; knows no HTTP.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from inferflux.server.errors import BusyError, NotReadyError

MAX_RETRY_AFTER_S = 120
_SMOOTHING = 0.1


class Admission:
    """running: requests inside. waiting: requests before the door, by model id. closed: nobody else gets in; those
    who wait still do."""

    def __init__(self, max_concurrent: int, max_queue: int) -> None:
        self.running = 0
        self.waiting: Counter[str] = Counter()
        self.closed = False
        self._max_concurrent = max_concurrent
        self._max_queue = max_queue
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0
        self._emptied = asyncio.Event()

    @asynccontextmanager
    async def enter(self, model_id: str) -> AsyncIterator[float]:
        """Holds a place while the body runs; yields the seconds waited for it.

        Raises BusyError at once when the queue is full, NotReadyError when the door is closed.
        """
        if self.closed:
            raise NotReadyError("the server is shutting down", "draining")
        start = time.monotonic()
        if self.running >= self._max_concurrent:
            await self._wait(model_id)
        else:
            self.running += 1
        admitted = time.monotonic()
        try:
            yield admitted - start
        finally:
            self._mean_s += _SMOOTHING * (time.monotonic() - admitted - self._mean_s)
            self._leave()

    def close(self) -> None:
        """Lets nobody in any more."""
        self.closed = True
        if self.running == 0:
            self._emptied.set()

    async def wait_empty(self) -> None:
        """Returns when the door is closed and the last request has left."""
        await self._emptied.wait()

    def _retry_after_s(self) -> int:
        """Whole seconds after which a place may be free: what is ahead, at the pace of late."""
        rounds = (sum(self.waiting.values()) + self.running) / self._max_concurrent
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._mean_s * rounds)))

    async def _wait(self, model_id: str) -> None:
        """Waits for a place handed on by one who leaves; `running` already counts it then."""
        if sum(self.waiting.values()) >= self._max_queue:
            message = f"the queue is full ({self._max_queue} requests wait); try again later"
            raise BusyError(message, self._retry_after_s())
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self.waiting[model_id] += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise
        finally:
            self.waiting[model_id] -= 1

    def _leave(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
        if self.closed and self.running == 0:
            self._emptied.set()
