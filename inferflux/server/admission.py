"""Admission: how many requests run at once, how many wait, and when the next one is refused.

Counts HTTP requests that generate; how their sequences share the engine is the scheduler's work. Waiting requests are
admitted by the scheduler's policy, so a full server neither starves a tenant nor delays what is urgent. Lives on one
event loop; knows no HTTP.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from inferflux.config.tree import ServerConfig
from inferflux.engine.scheduler.policies import AGE_STEP_S
from inferflux.server.access.rate_limit import retry_after_s
from inferflux.server.errors import BusyError, NotReadyError

_SMOOTHING = 0.1


@dataclass(slots=True, eq=False)
class Visitor:
    """A waiting request. tokens: of its prompts. since: when it came. turn: set when it is admitted."""

    model_id: str
    tenant: str
    priority: int
    tokens: int
    since: float = field(default_factory=time.monotonic)
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


# By policy, a number for each waiting request; the smallest goes first, and of equal ones the one that came first. The
# second argument counts each tenant's running requests.
_ORDERS: Final[Mapping[str, Callable[[Visitor, Counter[str]], float]]] = MappingProxyType(
    {
        "fcfs": lambda visitor, _places: visitor.since,
        "longest_prefix": lambda visitor, _places: visitor.since,
        "priority_age": lambda visitor, _places: visitor.since - AGE_STEP_S * visitor.priority,
        "fair": lambda visitor, places: places[visitor.tenant],
    }
)


class Admission:
    """running: admitted requests. waiting: requests not admitted yet, by model id. waiting_tokens: of their prompts.
    closed: no more requests are taken; those that wait are still admitted. policy: the scheduler's, for the order."""

    def __init__(
        self, max_concurrent: int, max_queue: int, max_queue_tokens: int = 2**63, policy: str = "fcfs"
    ) -> None:
        self.running = 0
        self.waiting: Counter[str] = Counter()
        self.waiting_tokens = 0
        self.closed = False
        self.policy = policy
        self._max_concurrent = max_concurrent
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self._queue: list[Visitor] = []
        self._places: Counter[str] = Counter()
        self._pace_s = 1.0 / max_concurrent
        self._last_freed = 0.0
        self._emptied = asyncio.Event()

    @asynccontextmanager
    async def enter(
        self, model_id: str, *, tenant: str = "", priority: int = 0, tokens: int = 0
    ) -> AsyncIterator[float]:
        """Holds a place while the body runs; yields the seconds waited for it.

        Raises BusyError at once when the queue is full, NotReadyError when the door is closed.
        """
        if self.closed:
            raise NotReadyError("the server is shutting down", "draining")
        start = time.monotonic()
        if self.running >= self._max_concurrent:
            await self._wait(Visitor(model_id, tenant, priority, tokens))
        else:
            self.running += 1
            self._places[tenant] += 1
            self._last_freed = start
        try:
            yield time.monotonic() - start
        finally:
            self._leave(tenant)

    def close(self) -> None:
        """Takes no more requests."""
        self.closed = True
        if self.running == 0:
            self._emptied.set()

    async def wait_empty(self) -> None:
        """Returns when the door is closed and the last request has left."""
        await self._emptied.wait()

    def _retry_after_s(self) -> int:
        """Whole seconds after which a place may be free: those ahead, at the pace at which places fall free."""
        since_last = time.monotonic() - self._last_freed
        expected = self._pace_s * len(self._queue) + max(self._pace_s, since_last)
        return retry_after_s(expected)

    async def _wait(self, visitor: Visitor) -> None:
        """Waits for a place handed on by one who leaves; `running` already counts it then."""
        self._check_room(visitor)
        self._queue.append(visitor)
        self.waiting[visitor.model_id] += 1
        self.waiting_tokens += visitor.tokens
        try:
            await visitor.turn
        except asyncio.CancelledError:
            if visitor.turn.done() and not visitor.turn.cancelled():
                self._leave(visitor.tenant)
            else:
                self._queue.remove(visitor)
            raise
        finally:
            self.waiting[visitor.model_id] -= 1
            self.waiting_tokens -= visitor.tokens

    def _check_room(self, visitor: Visitor) -> None:
        """Raises BusyError. A prompt that is longer than the whole bound may wait when it is the only one."""
        if len(self._queue) >= self._max_queue:
            what = f"{self._max_queue} requests"
        elif self._queue and self.waiting_tokens + visitor.tokens > self._max_queue_tokens:
            what = f"{self.waiting_tokens} prompt tokens"
        else:
            return
        raise BusyError(f"the queue is full ({what} wait); try again later", self._retry_after_s())

    def _leave(self, tenant: str) -> None:
        self._note_pace()
        self._places[tenant] -= 1
        if not self._places[tenant]:
            del self._places[tenant]
        if (visitor := self._next()) is not None:
            self._queue.remove(visitor)
            self._places[visitor.tenant] += 1
            visitor.turn.set_result(None)
            return
        self.running -= 1
        if self.closed and self.running == 0:
            self._emptied.set()

    def _next(self) -> Visitor | None:
        order = _ORDERS[self.policy]
        there = (visitor for visitor in self._queue if not visitor.turn.done())
        return min(there, key=lambda visitor: (order(visitor, self._places), visitor.since), default=None)

    def _note_pace(self) -> None:
        """Measures how often a place falls free while all are taken."""
        now = time.monotonic()
        if self.running >= self._max_concurrent:
            self._pace_s += _SMOOTHING * (now - self._last_freed - self._pace_s)
        self._last_freed = now


def open_admission(server: ServerConfig, policy: str) -> Admission:
    return Admission(server.max_concurrent, server.max_queue, server.max_queue_tokens, policy)
