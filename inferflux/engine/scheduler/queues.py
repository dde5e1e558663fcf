"""Queues: the requests by state (waiting, loading, running), and the transitions between states.

A running request has a slot and pages, a loading one pages, a waiting one neither. Carries out the scheduler's
decisions and makes none. One thread calls everything here.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable

from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import FinishReason, Request, RequestState
from inferflux.engine.scheduler.order import Order, by_rank
from inferflux.engine.scheduler.waiting import Waiting
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import TokenLogprobs


class Queues:
    """requests: all of them, by id. loading, running: sorted by rank.

    is_blocked: there was no room for the first waiting request, none has been freed since, and it is still the first.
    prompt_logprobs: those collected so far, by request id.
    """

    def __init__(
        self, num_slots: int, kv: KVManager, order: Order, stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        self.requests: dict[int, Request] = {}
        self.waiting = Waiting(order)
        self.loading: list[Request] = []
        self.running: list[Request] = []
        self.is_blocked = False
        self._blocked_first: Request | None = None
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))
        self._kv = kv
        self._order = order
        self._stats = stats
        self._clock = clock

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def add(self, request: Request) -> None:
        """Adds a new request, which waits."""
        self._order.enter(request)
        self.requests[request.id] = request
        self.waiting.add(request)
        self.is_blocked = False

    def update_favoured(self) -> bool:
        """Decides which tenants are favoured from now on; see `Order.update_favoured`."""
        before = self._order.fair_share.tenants
        has_favoured = self._order.update_favoured()
        for tenant in self._order.fair_share.tenants - before:
            self.waiting.note_favoured(tenant)
        return has_favoured

    def sort(self) -> None:
        """Ranks every request again."""
        self.waiting.sort()
        self._order.sort(self.running, self.loading)
        self.is_blocked = self.is_blocked and self.waiting.first is self._blocked_first

    def rearrange(self) -> None:
        """Ranks every request after a change of policy."""
        self.waiting.rearrange()
        self._order.sort(self.running, self.loading)
        self.is_blocked = False

    def block(self) -> None:
        """Records that there is no room for the first waiting request."""
        self.is_blocked = True
        self._blocked_first = self.waiting.first

    def load(self, request: Request) -> None:
        """Makes a waiting request a loading one: its prefix is being loaded into the pages it was given."""
        self.waiting.remove(request)
        request.state = RequestState.LOADING
        insort(self.loading, request, key=by_rank)

    def stop_loading(self, request: Request) -> None:
        """Makes a loading request wait again, whether or not its prefix is complete."""
        _remove(self.loading, request)
        self._kv.finish_load(request)
        request.state = RequestState.WAITING
        self.waiting.add(request)
        self.is_blocked = False

    def start(self, request: Request) -> None:
        """Makes a waiting request that has just been given pages a running one."""
        self.waiting.remove(request)
        request.slot = heapq.heappop(self._free_slots)
        request.state = RequestState.RUNNING
        insort(self.running, request, key=by_rank)
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached = request.num_computed
            self._order.charge_prompt(request)
        if request.sampling.prompt_logprobs is not None and request.num_output_tokens == 0:
            self.prompt_logprobs[request.id] = []

    def preempt(self, request: Request, *, turn_over: bool = False) -> None:
        """Makes a running request wait again. turn_over: behind the others, since its timeslice is over."""
        self._leave(request)
        if turn_over:
            self._order.queue_again(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.waiting.add(request)
        self._stats.preemptions += 1

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, in whichever queue it is."""
        if request.state is RequestState.LOADING:
            self.stop_loading(request)
        if request.state is RequestState.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
            self.is_blocked = False
        del self.requests[request.id]
        self._order.leave(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def check_integrity(self) -> None:
        """Asserts that every slot and request is accounted for, and in the right place."""
        slots = [request.slot for request in self.running if request.slot is not None]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), "a slot is lost or taken twice"
        assert len(slots) == len(self.running), "a running request has no slot"
        assert all(not request.pages and request.slot is None for request in self.waiting)
        assert all(request.pages and request.slot is None for request in self.loading)
        self.waiting.check_integrity()
        assert all(request.state is RequestState.WAITING for request in self.waiting)
        for state, queue in ((RequestState.LOADING, self.loading), (RequestState.RUNNING, self.running)):
            assert all(request.state is state for request in queue)
            assert queue == sorted(queue, key=by_rank), "a queue is out of order"
        assert len(self.requests) == len(self.waiting) + len(self.loading) + len(self.running)
        assert self.prompt_logprobs.keys() <= {request.id for request in self.running}

    def _leave(self, request: Request) -> None:
        """Removes a request from the running list and takes back its pages and slot."""
        assert request.slot is not None
        _remove(self.running, request)
        self._kv.release(request)
        self.prompt_logprobs.pop(request.id, None)
        heapq.heappush(self._free_slots, request.slot)
        request.slot = None
        request.num_planned = request.num_pending = 0
        self.is_blocked = False


def _remove(queue: list[Request], request: Request) -> None:
    del queue[bisect_left(queue, request.rank, key=by_rank)]
