"""Order: puts the scheduling policy to use. Ranks requests, and says who should make room for whom.

Holds what ranking needs to remember (the policy in force, the tenants' counters, the turns given out); the queues and
the pages are the scheduler's. One thread calls everything here.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from itertools import count
from operator import attrgetter

from inferflux.config import FairnessConfig
from inferflux.engine.pace import StepPace
from inferflux.engine.policies import Books, Policy, policy_named
from inferflux.engine.request import Request
from inferflux.engine.tenants import OUTPUT_TOKEN, PROMPT_TOKEN, TenantCounters

by_rank = attrgetter("rank")

# Looking up a prefix takes time: of a longer queue only the oldest are looked up.
MAX_LOOKED_UP = 128

# A tenant's share of the machine's time, less what is lost on the way: prefills of others, a step just begun.
_SHARE = 0.8

_URGENT, _USUAL = 0, 1


class Order:
    """num_cached: tokens of a waiting request's prefix that are cached. Raises ConfigError for an unknown policy."""

    def __init__(
        self,
        policy: str | Policy,
        fairness: FairnessConfig,
        num_cached: Callable[[Request], int],
        clock: Callable[[], float],
    ) -> None:
        self._num_cached = num_cached
        self._clock = clock
        self._tenants = TenantCounters()
        self._turns = count()
        self._pace = StepPace()
        self._most_rows = math.inf
        self._looks = False
        self.configure(policy, fairness)

    def configure(self, policy: str | Policy, fairness: FairnessConfig) -> None:
        """Puts a policy in force, by its name or one of your own; all requests have to be sorted anew.

        Raises ConfigError, and nothing has changed.
        """
        self._policy = policy if isinstance(policy, Policy) else policy_named(policy)
        self._fairness = fairness

    @property
    def moves(self) -> bool:
        """Whether ranks change while requests wait, so that they have to be sorted anew before each step."""
        return self._policy.moves

    @property
    def shares(self) -> bool:
        """Whether a request that starts changes who goes next."""
        return self._policy.shares

    def enter(self, request: Request) -> None:
        """Takes in a new request and ranks it."""
        self._tenants.enter(request.tenant)
        self._rank(request, next(self._turns), self._books(self._num_cached))

    def leave(self, request: Request) -> None:
        self._tenants.leave(request.tenant)

    def queue_again(self, request: Request) -> None:
        """Ranks a request whose timeslice is over as if it came now."""
        request.queued_time = self._clock()
        request.turn_start = len(request.tokens)
        request.num_turns += 1
        self._rank(request, next(self._turns), self._books(self._num_cached))

    def charge_prompt(self, request: Request) -> None:
        """Notes that a request starts for the first time; what is cached costs its tenant nothing."""
        self._tenants.charge(request.tenant, PROMPT_TOKEN * request.num_uncomputed)

    def charge_output(self, request: Request) -> None:
        """Notes one generated token."""
        self._tenants.charge(request.tenant, OUTPUT_TOKEN)

    def sort(self, *queues: list[Request]) -> None:
        """Ranks every request anew and puts the queues in order."""
        books, unread = self._books(self._num_cached), self._books(lambda _request: 0)
        for queue in queues:
            queue.sort(key=attrgetter("queued_time"))
            for place, request in enumerate(queue):
                self._rank(request, request.rank[-1], books if place < MAX_LOOKED_UP else unread)
            queue.sort(key=by_rank)

    def spent(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        """Returns the running requests that have produced their timeslice and, if they queued again now, would stand
        behind one that waits; no more than there are of those."""
        limit = self._fairness.max_timeslice_tokens
        if not limit:
            return []
        candidates = [request for request in reversed(running) if len(request.tokens) - request.turn_start >= limit]
        spent = []
        for ahead, request in zip(waiting, candidates, strict=False):
            again = copy(request)
            again.num_computed = 0
            self.queue_again(again)
            if ahead.rank < again.rank:
                spent.append(request)
        return spent

    def note_step(self, num_rows: int, seconds: float) -> None:
        """Takes in how long a step took that decoded and did nothing else."""
        if self._policy.shares:
            self._pace.note(num_rows, seconds)

    def next_rows(self, running: list[Request]) -> list[Request]:
        """Returns which of the running requests the next step computes: all of them, unless that would slow down a
        tenant that asks for little to less than its share of the machine. Then the ones beyond sit it out."""
        self._most_rows = self._limit() if self._policy.shares else math.inf
        if len(running) <= self._most_rows:
            return running
        self.sort(running)
        return running[: int(self._most_rows)]

    @property
    def is_limited(self) -> bool:
        """Whether the next step is to be a small one, in prompts too."""
        return self._most_rows < math.inf

    def may_start(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether a request would be among the next rows."""
        return len(running) < self._most_rows or bisect_left(running, request.rank, key=by_rank) < self._most_rows

    def _limit(self) -> float:
        """Most rows of a step with which no tenant's requests take much longer than the number of tenants times what
        they take alone. No limit where no tenant has so few requests that it matters. While nobody knows how steps grow
        with their rows, every other one is small, to find out."""
        counts = self._tenants.num_requests
        if len(counts) < 2:
            return math.inf
        rows = self._pace.rows_within(_SHARE * len(counts))
        if rows is None:
            self._looks = not self._looks
            return len(counts) if self._looks else math.inf
        rows = max(rows, len(counts))
        return math.inf if min(counts.values()) * len(counts) > rows else rows

    def victim(self, request: Request, running: Sequence[Request]) -> Request | None:
        """Returns whose place a waiting request may take; None when it has to wait for one to fall free.

        A request of high priority takes that of the last one that has none. Where places are shared among tenants, one
        passes from a tenant to another that has at least two fewer: so no place is ever passed back.
        """
        if not self._fairness.enable_preemption:
            return None
        lower = [other for other in reversed(running) if other.rank > request.rank]
        if self._is_high(request):
            return next((other for other in lower if not self._is_high(other)), None)
        if not self._policy.shares:
            return None
        places = Counter(other.tenant for other in running)
        few = places[request.tenant] + 2
        return next((other for other in lower if places[other.tenant] >= few and not self._is_high(other)), None)

    def _rank(self, request: Request, turn: int, books: Books) -> None:
        goes_first = self._fairness.enable_preemption and self._is_high(request) and not self._policy.ages
        request.rank = (_URGENT if goes_first else _USUAL, self._policy.value(request, books), turn)

    def _is_high(self, request: Request) -> bool:
        return request.priority >= self._fairness.high_priority_threshold

    def _books(self, num_cached: Callable[[Request], int]) -> Books:
        return Books(self._clock(), self._tenants.served, num_cached)
