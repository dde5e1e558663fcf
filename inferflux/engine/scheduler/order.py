"""Order: applies the scheduling policy. Ranks requests, and decides which one is preempted for which.

Holds the state that ranking needs (the current policy, the tenants' counters, the arrival numbers); the queues and the
pages are the scheduler's. One thread calls everything here.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from itertools import count
from math import inf
from operator import attrgetter

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.request import Request
from inferflux.engine.scheduler.fair_share import FairShare, SharedStep
from inferflux.engine.scheduler.policies import Policy, PolicyContext, policy_named
from inferflux.engine.scheduler.step_time import StepSize
from inferflux.engine.scheduler.tenants import OUTPUT_TOKEN, PROMPT_TOKEN, TenantCounters

# Tier, the policy's number, turn.
Rank = tuple[int, float, int]
by_rank = attrgetter("rank")

# Looking up a prefix takes time: in a longer queue only the oldest requests are looked up.
MAX_LOOKED_UP = 128

_URGENT, _FAVOURED, _USUAL = 0, 1, 2


class Order:
    """num_cached: returns how many tokens of a waiting request's prefix are cached. fair_share: which tenants go first.

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
        self.fair_share = FairShare(config)
        self.configure(config.policy, fairness)

    def configure(self, policy: str | Policy, fairness: FairnessConfig) -> None:
        """Switches to another policy, by name or one of your own; all requests have to be sorted again.

        Raises ConfigError for an unknown name; then nothing has changed.
        """
        self._policy = policy if isinstance(policy, Policy) else policy_named(policy)
        self._fairness = fairness
        if not self._policy.by_tenant:
            self.fair_share.end()

    @property
    def is_dynamic(self) -> bool:
        """Whether ranks change while requests wait, so that they have to be sorted before each step."""
        return self._policy.is_dynamic

    @property
    def by_tenant(self) -> bool:
        """Whether a request that starts changes who goes next."""
        return self._policy.by_tenant

    def enter(self, request: Request) -> None:
        """Registers a new request and ranks it."""
        self._tenants.enter(request.tenant)
        self._rank_last(request)

    def leave(self, request: Request) -> None:
        self._tenants.leave(request.tenant)

    def queue_again(self, request: Request) -> None:
        """Ranks a request whose timeslice is over as if it had just arrived."""
        request.queued_time = self._clock()
        request.turn_start = len(request.tokens)
        request.num_turns += 1
        self._rank_last(request)

    def charge_prompt(self, request: Request) -> None:
        """Charges the tenant for a prompt that starts for the first time; cached tokens are free."""
        self._tenants.charge(request.tenant, PROMPT_TOKEN * request.num_uncomputed)

    def charge_output(self, request: Request) -> None:
        """Charges the tenant for one generated token."""
        self._tenants.charge(request.tenant, OUTPUT_TOKEN)

    def sort(self, *queues: list[Request]) -> None:
        """Ranks every request again and sorts the queues."""
        context, without_cache = self._context(self._num_cached), self._context(lambda _request: 0)
        for queue in queues:
            if self._policy.reads_cache:
                queue.sort(key=attrgetter("queued_time"))
                self._rank(queue[:MAX_LOOKED_UP], context)
                self._rank(queue[MAX_LOOKED_UP:], without_cache)
            else:
                self._rank(queue, without_cache)
            queue.sort(key=by_rank)

    def rank(self, request: Request) -> None:
        """Ranks a request again; its turn stays."""
        self._rank([request], self._context(self._num_cached))

    def lane_key(self, request: Request) -> Rank:
        """Returns the key that a waiting request is sorted by in its lane. Where places are shared, a lane is a
        tenant's, and so is the policy's number: it is left out, as it changes and the order in the lane does not."""
        tier, _, turn = request.rank
        return (min(tier, _FAVOURED), 0.0, turn) if self._policy.by_tenant else request.rank

    def spent(self, front: Callable[[int], list[Request]], running: Sequence[Request]) -> list[Request]:
        """Returns the running requests that have used up their timeslice and, if they queued again now, would rank
        behind a waiting one; at most as many as there are waiting. front: returns the first n waiting requests, in
        order."""
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

    def update_favoured(self) -> bool:
        """Decides which tenants are favoured from now on; called before each step. Returns whether any is: then all
        requests have to be sorted again."""
        if not self._policy.by_tenant:
            self.fair_share.note_present(self._tenants, self._clock())
            return False
        self.fair_share.update(self._tenants, self._clock())
        return bool(self.fair_share.tenants)

    def is_favoured(self, request: Request) -> bool:
        return request.tenant in self.fair_share.tenants

    def goes_first(self, request: Request) -> bool:
        """Whether a request gets a row in every step: it is urgent, or its tenant is favoured."""
        return request.rank[0] < _USUAL

    def num_first(self, running: Sequence[Request]) -> int:
        """Returns how many of the running requests go first; they are at the front of the list."""
        return bisect_left(running, _USUAL, key=lambda request: request.rank[0])

    def note_step(self, size: StepSize, shared: SharedStep | None, seconds: float) -> None:
        """Learns from a step's time. shared: as `FairShare.plan` returned it when the step was planned."""
        if self._policy.by_tenant:
            self.fair_share.note(size, shared, seconds)

    def may_displace(self, first: Request) -> bool:
        """Whether a waiting request may preempt a running one; if not, the order of the waiting ones does not matter
        until a slot is free. first: the first waiting request; one of high priority is always in front."""
        if self._policy.by_tenant or self._fairness.max_timeslice_tokens:
            return True
        return self._fairness.enable_preemption and self._is_high(first)

    def victim(self, request: Request, running: Sequence[Request]) -> Request | None:
        """Returns the running request that a waiting one may preempt; None when it has to wait for a free slot.

        A request of high priority preempts the last one without. Where slots are shared among tenants, one passes from
        a tenant to another that has at least two fewer, or is favoured and has fewer: so no slot is ever passed back.
        """
        if not self._fairness.enable_preemption:
            return None
        lower = [other for other in reversed(running) if other.rank > request.rank]
        if self._is_high(request):
            return next((other for other in lower if not self._is_high(other)), None)
        if not self._policy.by_tenant:
            return None
        places = Counter(other.tenant for other in running)
        few = places[request.tenant] + (1 if self.is_favoured(request) else 2)
        return next((other for other in lower if places[other.tenant] >= few and not self._is_high(other)), None)

    def _rank(self, requests: Iterable[Request], context: PolicyContext) -> None:
        """Ranks requests; their turns stay."""
        value, by_tenant, favoured = self._policy.value, self._policy.by_tenant, self.fair_share.tenants
        # Where age counts against priority, that is all that priority does.
        urgent = self._fairness.high_priority_threshold if self._fairness.enable_preemption else inf
        if self._policy.weighs_priority:
            urgent = inf
        numbers: dict[str, float] = {}
        for request in requests:
            tenant = request.tenant
            tier = _URGENT if request.priority >= urgent else _FAVOURED if tenant in favoured else _USUAL
            # Where slots are shared, a tenant's requests, which may be thousands, all have its number.
            if not by_tenant or tenant not in numbers:
                numbers[tenant] = value(request, context)
            request.rank = (tier, numbers[tenant], request.rank[2])

    def _rank_last(self, request: Request) -> None:
        """Ranks a request that queues now."""
        request.rank = (_USUAL, 0.0, next(self._turns))
        self.rank(request)

    def _is_high(self, request: Request) -> bool:
        return request.priority >= self._fairness.high_priority_threshold

    def _context(self, num_cached: Callable[[Request], int]) -> PolicyContext:
        return PolicyContext(self._clock(), self._tenants.served, num_cached)
