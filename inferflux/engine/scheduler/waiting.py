"""Waiting: the waiting requests, in the order in which they are to run.

Where slots are shared among tenants, each tenant has a lane, in which the order never changes, and the next request is
the first of the lane whose tenant has been served least: so the cost of a step depends on the requests it starts, not
on how many wait. Under the other policies all are in one lane. Decides nothing; one thread calls everything here.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

from inferflux.engine.request import Request
from inferflux.engine.scheduler.lazy_heap import LazyHeap
from inferflux.engine.scheduler.order import Order, Rank

# The one lane of policies that do not share slots among tenants.
_ALL = ""


class Waiting:
    """order: ranks the requests. The first one is ranked by what its tenant had been served at the last `sort` or
    `take_back`, so a tenant's requests that start one after another keep the order in which they came.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lanes: dict[str, list[Request]] = {}
        self._first_lane: LazyHeap[Rank] = LazyHeap(self._rank_of)
        self._num = 0
        self._aside: list[Request] = []
        self._numbers: dict[str, float] = {}

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Request]:
        """Yields all, in no order to rely on."""
        return chain.from_iterable(self._lanes.values())

    @property
    def first(self) -> Request:
        """The next request; at least one must be waiting."""
        name = self._first_lane.first()
        assert name is not None, "nobody waits"
        head = self._lanes[name][0]
        if self._order.by_tenant:
            tier, number, turn = head.rank
            head.rank = (tier, self._numbers.setdefault(name, number), turn)
        return head

    def add(self, request: Request) -> None:
        """Adds a request that has been ranked."""
        name = self._lane_name(request)
        insort(self._lanes.setdefault(name, []), request, key=self._order.lane_key)
        self._num += 1
        self._first_lane.put(name)

    def remove(self, request: Request) -> None:
        key, name = self._order.lane_key, self._lane_name(request)
        lane = self._lanes[name]
        del lane[bisect_left(lane, key(request), key=key)]
        self._num -= 1
        if not lane:
            del self._lanes[name]
            self._first_lane.remove(name)

    def set_aside(self, request: Request) -> None:
        """Leaves a request out until `take_back`, to get at those after it."""
        self.remove(request)
        self._aside.append(request)

    def take_back(self) -> None:
        """Puts back the requests that were set aside."""
        while self._aside:
            self.add(self._aside.pop())
        self._numbers.clear()

    def front(self, num: int) -> list[Request]:
        """Returns the first `num` in order, or all when they are fewer."""
        while len(self._aside) < num and self._num:
            self.set_aside(self.first)
        front = self._aside.copy()
        self.take_back()
        return front

    def sort(self) -> None:
        """Ranks all requests again."""
        self._numbers.clear()
        if not self._order.by_tenant and self._num:
            self._order.sort(self._lanes[_ALL])

    def note_favoured(self, tenant: str) -> None:
        """Records that the tenant has become a favoured one."""
        if tenant in self._lanes:
            self._first_lane.put(tenant)

    def rearrange(self) -> None:
        """Ranks and sorts all requests after a change of policy."""
        requests = list(self)
        self._order.sort(requests)
        self._lanes.clear()
        self._first_lane.clear()
        self._numbers.clear()
        self._num = 0
        for request in requests:
            self.add(request)

    def check_integrity(self) -> None:
        """Asserts that every request is in the right place."""
        assert not self._aside
        assert self._num == sum(map(len, self._lanes.values()))
        assert all(self._lanes.values())
        assert len(self._first_lane) == len(self._lanes)
        for name, lane in self._lanes.items():
            assert lane == sorted(lane, key=self._order.lane_key), "a lane is out of order"
            assert all(self._lane_name(request) == name for request in lane)
        if self._num:
            first = min(self._lanes, key=self._rank_of)
            assert self._first_lane.first() == first, "another lane is first"

    def _lane_name(self, request: Request) -> str:
        return request.tenant if self._order.by_tenant else _ALL

    def _rank_of(self, name: str) -> Rank:
        head = self._lanes[name][0]
        if self._order.by_tenant:
            self._order.rank(head)
        return head.rank
