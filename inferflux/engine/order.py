"""Order: puts the scheduling policy to use. Ranks requests, and says who should make room for whom.

Holds what ranking needs to remember (the policy in force, the tenants' counters, the turns given out); the queues and
the pages are the scheduler's. One thread calls everything here.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from itertools import count
from math import inf
from operator import attrgetter

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.favour import Beside, Favour
from inferflux.engine.pace import Load
from inferflux.engine.policies import Books, Policy, policy_named
from inferflux.engine.request import Request
from inferflux.engine.tenants import OUTPUT_TOKEN, PROMPT_TOKEN, TenantCounters

# Tier, the policy's number, turn.
Rank = tuple[int, float, int]
by_rank = attrgetter("rank")

# Looking up a prefix takes time: of a longer queue only the oldest are looked up.
MAX_LOOKED_UP = 128

_URGENT, _FAVOURED, _USUAL = 0, 1, 2


class Order:
    """num_cached: tokens of a waiting request's prefix that are cached. favour: which tenants go first.

    Raises ConfigError for an unknown policy.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        fairness: FairnessConfig,
        num_cached: Callable[[Request], int],
        clock: Callable[[], float],
    ) -> None:
        self._num_cached = num_cached
        self._clock = clock
        self._tenants = TenantCounters()
        self._turns = count()
        self.favour = Favour(config)
        self.configure(config.policy, fairness)

    def configure(self, policy: str | Policy, fairness: FairnessConfig) -> None:
        """Puts a policy in force, by its name or one of your own; all requests have to be sorted anew.

        Raises ConfigError, and nothing has changed.
        """
        self._policy = policy if isinstance(policy, Policy) else policy_named(policy)
        self._fairness = fairness
        if not self._policy.shares:
            self.favour.end()

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
        self._rank_last(request)

    def leave(self, request: Request) -> None:
        self._tenants.leave(request.tenant)

    def queue_again(self, request: Request) -> None:
        """Ranks a request whose timeslice is over as if it came now."""
        request.queued_time = self._clock()
        request.turn_start = len(request.tokens)
        request.num_turns += 1
        self._rank_last(request)

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
            if self._policy.looks_up:
                queue.sort(key=attrgetter("queued_time"))
                self._rank(queue[:MAX_LOOKED_UP], books)
                self._rank(queue[MAX_LOOKED_UP:], unread)
            else:
                self._rank(queue, unread)
            queue.sort(key=by_rank)

    def rank(self, request: Request) -> None:
        """Ranks a request anew, by the turn it has."""
        self._rank([request], self._books(self._num_cached))

    def lane_key(self, request: Request) -> Rank:
        """Returns the key that a waiting request is sorted by in its lane. Where places are shared, a lane is a
        tenant's, and so is the policy's number: it is left out, as it changes and the order in the lane does not."""
        tier, _, turn = request.rank
        return (min(tier, _FAVOURED), 0.0, turn) if self._policy.shares else request.rank

    def spent(self, front: Callable[[int], list[Request]], running: Sequence[Request]) -> list[Request]:
        """Returns the running requests that have produced their timeslice and, if they queued again now, would stand
        behind one that waits; no more than there are of those. front: returns so many of those that wait, in order."""
        limit = self._fairness.max_timeslice_tokens
        if not limit:
            return []
        candidates = [request for request in reversed(running) if len(request.tokens) - request.turn_start >= limit]
        spent = []
        for ahead, request in zip(front(len(candidates)), candidates, strict=False):
            again = copy(request)
            again.num_computed = 0
            self.queue_again(again)
            if ahead.rank < again.rank:
                spent.append(request)
        return spent

    def look(self) -> bool:
        """Sees which tenants are favoured from now on, to be called before each step. Returns whether any is; then all
        requests have to be sorted anew."""
        if not self._policy.shares:
            return False
        self.favour.look(self._tenants, self._clock())
        return bool(self.favour.tenants)

    def is_favoured(self, request: Request) -> bool:
        return request.tenant in self.favour.tenants

    def goes_first(self, request: Request) -> bool:
        """Whether a request has a row in each step, whatever others have: it is urgent, or favoured."""
        return request.rank[0] < _USUAL

    def num_first(self, running: Sequence[Request]) -> int:
        """How many of these go first; they stand in front."""
        return bisect_left(running, _USUAL, key=lambda request: request.rank[0])

    def note_step(self, load: Load, beside: Beside | None, seconds: float) -> None:
        """Takes in how long a step took; beside: what was said of it when it was planned."""
        if self._policy.shares:
            self.favour.note(load, beside, seconds)

    def may_displace(self, first: Request) -> bool:
        """Whether one that waits may take the place of one that runs; if not, how those that wait stand is of no
        matter until a place falls free. first: of those that wait; one of high priority always stands in front."""
        if self._policy.shares or self._fairness.max_timeslice_tokens:
            return True
        return self._fairness.enable_preemption and self._is_high(first)

    def victim(self, request: Request, running: Sequence[Request]) -> Request | None:
        """Returns whose place a waiting request may take; None when it has to wait for one to fall free.

        A request of high priority takes that of the last one that has none. Where places are shared among tenants, one
        passes from a tenant to another that has at least two fewer, or is favoured and has fewer: so no place is ever
        passed back.
        """
        if not self._fairness.enable_preemption:
            return None
        lower = [other for other in reversed(running) if other.rank > request.rank]
        if self._is_high(request):
            return next((other for other in lower if not self._is_high(other)), None)
        if not self._policy.shares:
            return None
        places = Counter(other.tenant for other in running)
        few = places[request.tenant] + (1 if self.is_favoured(request) else 2)
        return next((other for other in lower if places[other.tenant] >= few and not self._is_high(other)), None)

    def _rank(self, requests: Iterable[Request], books: Books) -> None:
        """Ranks requests by the turns they have."""
        value, shares, favoured = self._policy.value, self._policy.shares, self.favour.tenants
        # Where age counts against priority, that is all that priority does.
        urgent = self._fairness.high_priority_threshold if self._fairness.enable_preemption else inf
        if self._policy.ages:
            urgent = inf
        numbers: dict[str, float] = {}
        for request in requests:
            tenant = request.tenant
            tier = _URGENT if request.priority >= urgent else _FAVOURED if tenant in favoured else _USUAL
            # Where places are shared, a tenant's requests, which may be thousands, all have its number.
            if not shares or tenant not in numbers:
                numbers[tenant] = value(request, books)
            request.rank = (tier, numbers[tenant], request.rank[2])

    def _rank_last(self, request: Request) -> None:
        """Ranks a request that queues now."""
        request.rank = (_USUAL, 0.0, next(self._turns))
        self.rank(request)

    def _is_high(self, request: Request) -> bool:
        return request.priority >= self._fairness.high_priority_threshold

    def _books(self, num_cached: Callable[[Request], int]) -> Books:
        return Books(self._clock(), self._tenants.served, num_cached)
