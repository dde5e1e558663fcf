"""Who waits under `fair` stands as if all were ranked and sorted at each look, and a step does not cost by how many
wait."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.request import Request
from inferflux.engine.scheduler.order import Order
from inferflux.engine.scheduler.policies import POLICIES
from inferflux.engine.scheduler.queues import Queues
from inferflux.engine.scheduler.tenants import TenantCounters
from inferflux.engine.stats import EngineStats
from inferflux.sampling_params import SamplingParams
from tests.support.workbench import Workbench

TENANTS = "abcdef"
URGENT = 2


def simple_rank(queues: Queues, request: Request) -> tuple[int, int, int]:
    """Urgent ones first, then those of favoured tenants; then by what the tenant was served, then as they came."""
    order, tenant = queues._order, request.tenant
    tier = 0 if request.priority >= URGENT else 1 if order.is_favoured(request) else 2
    return tier, order._tenants.served(tenant), request.rank[2]


class WaitingLife(RuleBasedStateMachine):
    """Requests come, go and are served in any order; between any two moves the front is what sorting all would say."""

    @initialize(num_rows=st.integers(1, 8))
    def start(self, num_rows: int) -> None:
        fairness = FairnessConfig(high_priority_threshold=URGENT)
        config = SchedulerConfig(policy="fair", max_batch_size=num_rows, max_batch_tokens=8)
        order = Order(config, fairness, lambda _request: 0, lambda: 0.0)
        self.fairness = fairness
        self.queues = Queues(num_rows, Any, order, EngineStats(), lambda: 0.0)  # type: ignore[arg-type]
        self.num_requests = 0
        self.gone: list[Request] = []

    @property
    def requests(self) -> list[Request]:
        return list(self.queues.waiting)

    @rule(tenant=st.sampled_from(TENANTS), priority=st.integers(0, URGENT), count=st.integers(1, 3))
    def add(self, tenant: str, priority: int, count: int) -> None:
        for _ in range(count):
            self.num_requests += 1
            request = Request(self.num_requests, [1], SamplingParams(), 0, 9, priority=priority, tenant=tenant)
            self.queues.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.queues.end(data.draw(st.sampled_from(self.requests)), "abort")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        """It starts, whoever it is."""
        request = data.draw(st.sampled_from(self.requests))
        self.queues.waiting.remove(request)
        self.gone.append(request)

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), turn_over=st.booleans())
    def come_back(self, data: st.DataObject, turn_over: bool) -> None:
        request = self.gone.pop(data.draw(st.integers(0, len(self.gone) - 1)))
        if turn_over:
            self.queues._order.queue_again(request)
        self.queues.waiting.add(request)

    @precondition(lambda self: self.queues.requests)
    @rule(data=st.data(), amount=st.integers(1, 9))
    def serve(self, data: st.DataObject, amount: int) -> None:
        request = data.draw(st.sampled_from(list(self.queues.requests.values())))
        self.queues._order._tenants.charge(request.tenant, amount)

    @rule()
    def look(self) -> None:
        self.queues.update_favoured()

    @rule(policy=st.sampled_from(["fcfs", "fair"]))
    def change_policy(self, policy: str) -> None:
        """There and back."""
        for name in (policy, "fair"):
            self.queues._order.configure(name, self.fairness)
            self.queues.rearrange()

    @rule(num=st.integers(1, 4))
    def front(self, num: int) -> None:
        expected = sorted(self.requests, key=lambda request: simple_rank(self.queues, request))
        assert self.queues.waiting.front(num) == expected[:num]

    @invariant()
    def the_first_is_who_sorting_would_say(self) -> None:
        if self.requests:
            assert self.queues.waiting.first == min(self.requests, key=lambda one: simple_rank(self.queues, one))
        self.queues.waiting.check_integrity()


TestWaitingLife = WaitingLife.TestCase
TestWaitingLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def num_bytecodes(function: Callable[[], object]) -> int:
    """Returns how many bytecodes of Python it executes: the same every time, on any machine."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def costs_of_steps(num_waiting: int, num_tenants: int) -> list[int]:
    """Each step ends a request and starts another, while so many wait."""
    bench = Workbench(num_pages=64, max_batch_size=8, max_batch_tokens=64, policy="fair", prefix_cache=False)
    for number in range(num_waiting):
        bench.submit([number % 50], 8 if number < 8 else 2, tenant=str(number % num_tenants), ignore_eos=True)
    costs = []
    for _ in range(12):
        plan: list[Any] = []
        costs.append(num_bytecodes(lambda plan=plan: plan.append(bench.scheduler.schedule())))
        output = bench.runner.execute(plan[0])
        costs[-1] += num_bytecodes(lambda plan=plan, output=output: bench.scheduler.update(plan[0], output))
    return costs[1:]


@pytest.mark.parametrize("num_tenants", [1, 4, 300])
def test_a_step_costs_by_what_it_starts_and_not_by_who_waits(num_tenants: int) -> None:
    few, many = costs_of_steps(350, num_tenants), costs_of_steps(3500, num_tenants)
    assert sum(many) < 1.1 * sum(few)
    assert max(many) < 3 * sum(few) / len(few)


def test_a_step_does_not_cost_by_the_number_of_tenants() -> None:
    few, many = costs_of_steps(2000, 200), costs_of_steps(2000, 2000)
    assert sum(many) < 1.5 * sum(few)


def test_the_least_served_is_found_among_thousands_at_once() -> None:
    """So a request comes and goes at the same cost whoever else is there."""
    costs = []
    for num_tenants in (40, 4000):
        tenants = TenantCounters()
        for number in range(num_tenants):
            tenants.enter(str(number))
            tenants.charge(str(number), number % 17)
        costs.append(num_bytecodes(lambda tenants=tenants: [tenants.enter("new"), tenants.leave("new")]))
    assert costs[1] < 4 * costs[0]


def test_every_policy_by_which_places_are_shared_is_compared_here() -> None:
    assert [name for name, policy in POLICIES.items() if policy.by_tenant] == ["fair"]
