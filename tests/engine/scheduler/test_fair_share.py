"""One tenant's few requests beside another's many, under `fair`: on a simulated clock, on machines whose steps take
longer with every row (a CPU), nearly as long with every number (a GPU), or where rows are all that takes time.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.request import Request, RequestState
from inferflux.engine.scheduler.fair_share import (
    ARRIVAL_WINDOW_S,
    LATENCY_FACTOR,
    LEAST_CHUNK,
    MAX_CREDIT_STEPS,
    FairShare,
)
from inferflux.engine.scheduler.step_time import StepSize, StepTimeModel
from inferflux.engine.scheduler.tenants import TenantCounters
from inferflux.engine.step import StepPlan
from inferflux.sampling_params import SamplingParams
from tests.support.workbench import Workbench

DEFAULT = SchedulerConfig()


def prompt_of(length: int, start: int) -> list[int]:
    return [(start + 3 * i + i * i * start) % 50 for i in range(length)]


@dataclass(frozen=True)
class Machine:
    """How long a step takes: a fixed part, and parts per decoded row and per token of a prompt; give or take `noise`
    of it, and every hundredth step five times as long."""

    fixed_s: float
    row_s: float
    prompt_s: float
    noise: float = 0.0

    def seconds_of(self, plan: StepPlan) -> float:
        num_decoded = sum(len(row.token_ids) == 1 for row in plan.rows)
        seconds = self.fixed_s + self.row_s * num_decoded + self.prompt_s * (plan.num_tokens - num_decoded)
        if self.noise:
            chance = random.Random(plan.step_id)
            seconds *= 1 + self.noise * chance.uniform(-1, 1)
            seconds *= 5 if chance.random() < 0.01 else 1
        return seconds


# The first as measured for the demo model on two cores: 128 rows take as long as six, 2048 tokens as long as fifty.
CPU = Machine(0.009, 0.0003, 0.0002)
GPU = Machine(0.010, 0.00001, 0.00001)
STEEP = Machine(0.0001, 0.002, 0.0005)
MACHINES = {"CPU": CPU, "GPU": GPU, "steep": STEEP, "noisy CPU": replace(CPU, noise=0.3)}


@dataclass(frozen=True)
class HeldUp(Machine):
    """Steps of a single row take so many times as long, one after another."""

    times: list[float] = field(default_factory=list)

    def seconds_of(self, plan: StepPlan) -> float:
        return super().seconds_of(plan) * (self.times.pop() if plan.num_tokens == 1 and self.times else 1.0)


class Timed:
    """A workbench on which time passes as it would on that machine. Every prompt is another, so nothing is cached."""

    def __init__(self, machine: Machine, ahead: bool = False, **config: Any) -> None:
        size = config.get("max_batch_size", DEFAULT.max_batch_size)
        defaults = {"max_batch_tokens": DEFAULT.max_batch_tokens, "max_batch_size": size, "policy": "fair"}
        settings: dict[str, Any] = {"num_pages": 20 * size, **defaults, **config}
        self.bench = Workbench(page_tokens=16, prefix_cache=False, ahead=ahead, **settings)
        self._machine = machine
        self._free_at = 0.0
        self._ends: deque[float] = deque()

    def submit(self, tenant: str, prompt: int = 64, out: int = 64, priority: int = 0) -> Request:
        tokens = prompt_of(prompt, len(self.bench.requests))
        return self.bench.submit(tokens, out, tenant=tenant, ignore_eos=True, priority=priority)

    def crowd(self, num: int, tenant: str = "a") -> None:
        """Requests of many sizes, for else all would start and end together."""
        for number in range(num):
            self.submit(tenant, 32 + 8 * (number % 13), 40 + 8 * (number % 7))

    def launch(self) -> bool:
        launched = self.bench.launch()
        self.bench.clock -= 1
        if launched:
            seconds = self._machine.seconds_of(self.bench.plans[-1])
            self._free_at = max(self._free_at, self.bench.clock) + seconds
            self._ends.append(self._free_at)
        return launched

    def step(self) -> None:
        """As the engine does it: with as many steps in flight as there may be, the oldest one lands."""
        flights, most = self.bench.flights, self.bench.max_flights
        if len(flights) == most or not self.launch() or len(flights) == most:
            self.bench.clock = self._ends.popleft()
            self.bench.land()

    def run(self, until: Callable[[], bool]) -> float:
        """Steps until then; returns the seconds it took."""
        start = self.bench.clock
        while not until():
            self.step()
        return self.bench.clock - start

    def steps(self, num: int) -> float:
        """So many steps more; returns the seconds they took."""
        end = len(self.bench.plans) + num
        return self.run(lambda: len(self.bench.plans) >= end)

    def num_here(self, tenant: str) -> int:
        return sum(r.tenant == tenant and r.state is not RequestState.FINISHED for r in self.bench.requests.values())

    def num_output(self, tenant: str) -> int:
        return sum(r.num_output_tokens for r in self.bench.requests.values() if r.tenant == tenant)

    def latency(self, tenant: str, prompt: int, out: int) -> float:
        """Returns the seconds of a request that comes just after a step has begun, if there is anything to compute."""
        start = self.bench.clock
        if self.bench.scheduler.has_work and len(self.bench.flights) < self.bench.max_flights:
            self.launch()
        one = self.submit(tenant, prompt, out)
        self.run(lambda: one.state is RequestState.FINISHED)
        return self.bench.clock - start


def solo_of(machine: Machine, prompt: int, out: int) -> float:
    return Timed(machine).latency("b", prompt, out)


@pytest.mark.parametrize("size", [8, 32, DEFAULT.max_batch_size])
@pytest.mark.parametrize("name", ["CPU", "noisy CPU", "GPU"])
def test_a_tenant_with_200_requests_at_most_doubles_what_anothers_single_ones_take(name: str, size: int) -> None:
    machine = MACHINES[name]
    timed = Timed(machine, ahead=name == "GPU", max_batch_size=size)
    timed.latency("b", 64, 32)  # so that several are known to come
    timed.crowd(200)
    timed.steps(50)
    for prompt, out in ((64, 32), (128, 64), (128, 32)):
        assert timed.latency("b", prompt, out) <= 2 * solo_of(machine, prompt, out)
        timed.crowd(200 - timed.num_here("a"))
        timed.steps(4)


@pytest.mark.parametrize("size", [8, 32, DEFAULT.max_batch_size])
def test_nor_does_it_when_its_first_step_is_held_up(size: int) -> None:
    """As where other processes use the cores. That was taken for what its steps take alone, so that the others were in
    each of them: of requests of the demo model every fifth took 50 times as long as alone."""
    machine = HeldUp(*astuple(CPU)[:3])
    timed = Timed(machine, max_batch_size=size)
    timed.latency("b", 64, 32)
    timed.crowd(200)
    timed.steps(50)
    delay = 30.0
    machine.times.append(delay)
    held_up_s = (delay - 1) * (CPU.fixed_s + CPU.row_s)
    assert timed.latency("b", 64, 64) - held_up_s <= 2 * solo_of(CPU, 64, 64)
    assert not machine.times


@pytest.mark.parametrize("num_pages", [4000, 1000], ids=["pages enough", "pages taken"])
def test_nor_does_it_wait_while_the_crowds_prompts_are_computed(num_pages: int) -> None:
    timed = Timed(CPU, num_pages=num_pages)
    timed.latency("b", 64, 32)
    for _ in range(40):
        timed.submit("a", prompt=1500)
    for _ in range(3):
        timed.steps(10)
        assert timed.latency("b", 96, 48) <= 2 * solo_of(CPU, 96, 48)


def test_first_come_first_served_it_waits_for_all_of_them() -> None:
    timed = Timed(CPU, max_batch_size=32, policy="fcfs")
    timed.crowd(200)
    assert timed.latency("b", 64, 32) > 20 * solo_of(CPU, 64, 32)


def rate_of_crowd(machine: Machine, others: Callable[[Timed], None]) -> float:
    """Returns a crowd's output tokens per second while others are there too; all of it goes on alike."""
    timed = Timed(machine, max_batch_size=16)
    for _ in range(12):
        timed.submit("a", prompt=8, out=250)
    timed.steps(20)
    before, seconds = timed.num_output("a"), 0.0
    for _ in range(70):
        others(timed)
        seconds += timed.steps(1)
    counts = [request.num_output_tokens for request in timed.bench.requests.values() if request.tenant == "a"]
    assert max(counts) - min(counts) <= 2, "its requests take turns"
    rate = (timed.num_output("a") - before) / seconds
    timed.bench.run()
    return rate


@pytest.mark.parametrize("name", ["CPU", "GPU", "steep"])
def test_the_crowd_goes_on_meanwhile(name: str) -> None:
    """Beside a tenant that always has a request it has the rest of the time, which on a GPU is nearly all of it."""

    def one_more(timed: Timed) -> None:
        if not timed.num_here("b"):
            timed.submit("b", 8, 30)

    part = 0.9 if name == "GPU" else 0.85 * (LATENCY_FACTOR - 1) / LATENCY_FACTOR
    alone = rate_of_crowd(MACHINES[name], lambda _timed: None)
    assert part * alone <= rate_of_crowd(MACHINES[name], one_more) < alone


def test_alone_a_tenant_is_served_as_under_any_policy() -> None:
    plans = []
    for policy in ("fair", "fcfs"):
        timed = Timed(CPU, policy=policy, max_batch_size=16)
        timed.crowd(40)
        timed.run(lambda timed=timed: not timed.bench.scheduler.has_work)
        plans.append(timed.bench.plans)
    assert plans[0] == plans[1]


def test_prompts_wait_for_no_longer_than_a_step_where_another_tenant_may_come() -> None:
    timed = Timed(CPU)
    timed.latency("a", 64, 4)  # what prompts take is known from here on
    for most in (DEFAULT.max_batch_tokens, DEFAULT.chunked_prefill_tokens):
        for _ in range(4):
            timed.submit("a", 1500, 4)
        timed.steps(1)
        assert timed.bench.plans[-1].num_tokens == most
        timed.bench.run()
        timed.latency("b", 4, 4)
    timed.bench.clock += ARRIVAL_WINDOW_S
    timed.submit("a", 1500, 4)
    timed.latency("a", 1500, 4)
    assert max(plan.num_tokens for plan in timed.bench.plans[-10:]) > DEFAULT.chunked_prefill_tokens


def test_a_policy_switched_to_knows_which_tenants_came_under_the_one_before() -> None:
    """It is switched to because others wait: one that came then would have had to wait for a step of 2048 tokens."""
    timed = Timed(CPU, policy="priority_age")
    timed.latency("b", 64, 4)
    for _ in range(4):
        timed.submit("a", 1500, 4)
    timed.steps(1)
    assert timed.bench.plans[-1].num_tokens == DEFAULT.max_batch_tokens
    timed.bench.scheduler.configure("fair", FairnessConfig())
    timed.steps(2)
    assert timed.bench.plans[-1].num_tokens <= DEFAULT.chunked_prefill_tokens + 2


def test_two_crowds_together_are_served_as_fast_as_one() -> None:
    rates = []
    for tenants in (("a", "a"), ("a", "b")):
        timed = Timed(CPU, max_batch_size=16)
        for _ in range(4):
            for tenant in tenants:
                timed.crowd(20, tenant)
        seconds = timed.steps(150)
        rates.append(sum(map(timed.num_output, set(tenants))) / seconds)
    assert rates[1] == pytest.approx(rates[0], rel=0.05)
    assert timed.num_output("a") == pytest.approx(timed.num_output("b"), rel=0.1)


def test_urgent_requests_of_the_crowd_never_sit_out() -> None:
    timed = Timed(STEEP, max_batch_size=16, fairness=FairnessConfig(high_priority_threshold=5))
    timed.crowd(40)
    timed.steps(5)
    timed.submit("b", 8, 200)
    timed.steps(40)
    urgent = timed.submit("a", 8, 60, priority=5)
    timed.steps(2)
    before = urgent.num_output_tokens
    timed.steps(30)
    assert urgent.num_output_tokens == before + 30
    assert min(len(plan.rows) for plan in timed.bench.plans[-30:]) == 2, "the rest did"


def test_a_place_passes_to_a_favoured_tenant_though_each_has_but_one() -> None:
    timed = Timed(CPU, max_batch_size=2)
    for tenant in ("a", "c"):
        timed.crowd(5, tenant)
    timed.steps(4)
    one = timed.submit("b", 8, 4)
    timed.steps(1)
    assert one.state is RequestState.RUNNING
    timed.bench.run()


def tenants_of(counts: dict[str, int], served: dict[str, int] | None = None) -> TenantCounters:
    tenants = TenantCounters()
    for tenant in [name for name, num in counts.items() for _ in range(num)]:
        tenants.enter(tenant)
    for tenant, amount in (served or {}).items():
        tenants.charge(tenant, amount)
    return tenants


def favoured(counts: dict[str, int], served: dict[str, int] | None = None, **config: int) -> set[str]:
    fair_share = FairShare(SchedulerConfig(**config))
    fair_share.update(tenants_of(counts, served), 0.0)
    return set(fair_share.tenants)


def test_who_asks_for_less_than_its_share_beside_one_that_asks_for_more_is_favoured() -> None:
    assert favoured({"a": 200}) == set()
    assert favoured({"a": 200, "b": 1}) == {"b"}
    assert favoured({"a": 200, "b": 1, "c": 40}) == {"b", "c"}
    assert favoured({"a": 200, "b": 200}) == set()
    assert favoured({"a": 1, "b": 1, "c": 1}) == set(), "nobody asks for more"
    assert favoured({"a": 9, **{str(n): 1 for n in range(8)}}, max_batch_size=8) == set(), "no place would be left"
    assert favoured({"a": 9, "b": 1}, {"a": 100, "b": 100 + 2048}) == {"b"}
    assert favoured({"a": 9, "b": 1}, {"a": 100, "b": 101 + 2048}) == set(), "it was served far more than the other"


@given(
    counts=st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(1, 4), max_size=12),
    amounts=st.lists(st.integers(0, 9), min_size=12, max_size=12),
    num_rows=st.integers(1, 6),
    max_tokens=st.integers(1, 6),
)
def test_of_many_tenants_the_same_are_favoured_as_by_looking_at_each(
    counts: dict[str, int], amounts: list[int], num_rows: int, max_tokens: int
) -> None:
    served = dict(zip(counts, amounts, strict=False))
    rows = min(num_rows, max_tokens)
    share = max(1.0, min(rows, sum(counts.values())) / max(1, len(counts)))
    others = [served[name] for name, num in counts.items() if num > share]
    fair = {
        name for name, num in counts.items() if others and num <= share and served[name] <= min(others) + max_tokens
    }
    expected = fair if sum(counts[name] for name in fair) < rows else set()
    assert favoured(counts, served, max_batch_size=num_rows, max_batch_tokens=max_tokens) == expected


def test_under_another_policy_nobody_is_favoured() -> None:
    timed = Timed(STEEP, max_batch_size=8)
    timed.crowd(20)
    timed.submit("b", 8, 100)
    timed.steps(6)  # by then all of the others have begun
    timed.bench.scheduler.configure("fcfs", FairnessConfig())
    timed.steps(30)
    assert {len(plan.rows) for plan in timed.bench.plans[-30:]} == {8}
    timed.bench.run()


def test_the_step_time_is_learnt_and_kept() -> None:
    step_time = StepTimeModel()
    for _ in range(20):
        step_time.note(StepSize(0, 2048), 0.009 + 2048 * 0.0002)
    for number in range(60):
        rows = 1 if number % 2 else 40
        step_time.note(StepSize(rows, 0), 0.009 + rows * 0.0003)
    assert step_time.seconds_of(StepSize(1, 0)) == pytest.approx(0.0093, rel=0.05)
    assert step_time.row_s == pytest.approx(0.0003, rel=0.1)
    assert step_time.token_s == pytest.approx(0.0002, rel=0.1), "of prompts nothing was heard meanwhile"
    step_time.note(StepSize(1, 0), 60.0)
    assert step_time.seconds_of(StepSize(1, 0)) < 0.03, "a step that something held up says little"


def test_a_long_first_step_is_soon_made_up_for() -> None:
    """The first steps meet cold caches: the mean of the first few, not a slow average that begins with the worst."""
    step_time = StepTimeModel()
    for seconds in (1.0, 0.01, 0.01):
        step_time.note(StepSize(1, 0), seconds)
    assert step_time.seconds_of(StepSize(1, 0)) == pytest.approx(0.34, rel=0.05)


def test_a_step_that_was_held_up_does_not_hold_up_the_others_for_long() -> None:
    fair_share = FairShare(SchedulerConfig())
    fair_share.update(tenants_of({"a": 9, "b": 1}), 0.0)
    one = Request(1, [1], SamplingParams(), 0, 9)
    for _ in range(20):
        fair_share.note(StepSize(1, 0), fair_share.plan(StepSize(1, 0), StepSize(1, 0)), 0.01)
    fair_share.note(StepSize(2, 0), fair_share.plan(StepSize(1, 0), StepSize(2, 0)), 60.0)
    num_steps = 0
    while fair_share.choose(StepSize(1, 0), [one], 10) == ([], 0):
        fair_share.note(StepSize(1, 0), fair_share.plan(StepSize(1, 0), StepSize(1, 0)), 0.01)
        num_steps += 1
    assert 0 < num_steps < 4 * MAX_CREDIT_STEPS / (LATENCY_FACTOR - 1)


@pytest.mark.parametrize("num_due", [2, 3, 4, 5, 64])
def test_a_prompt_whose_turn_it_is_gets_more_than_the_planner_would_refuse(num_due: int) -> None:
    """However dear its tokens are. Of a prompt of three the planner computes no two, which would leave one alone, and
    the turn would go by with nothing computed."""
    fair_share = FairShare(SchedulerConfig())
    fair_share.update(tenants_of({"a": 9, "b": 1}), 0.0)
    fair_share.note(StepSize(0, 64), None, 64.0)
    for _ in range(20):
        fair_share.note(StepSize(1, 0), fair_share.plan(StepSize(1, 0), StepSize(1, 0)), 0.01)
    prompt = Request(1, [1] * num_due, SamplingParams(), 0, 99)
    rows, budget = fair_share.choose(StepSize(1, 0), [prompt], 2000)
    assert rows == [prompt]
    assert budget == min(num_due, LEAST_CHUNK), "its credit is less than one token's time"
    assert Workbench().scheduler._planner._chunk(num_due, budget) >= 2


def test_a_favoured_request_without_room_takes_that_of_nobody_who_has_a_row_already() -> None:
    """The turn of the running one is over, but not before the next step."""
    timed = Timed(CPU, max_batch_size=8, num_pages=12, fairness=FairnessConfig(max_timeslice_tokens=2))
    first = timed.submit("b", 100, 60)
    timed.steps(6)
    for tenant in "aaaaaab":
        last = timed.submit(tenant, 90, 20)
    timed.steps(1)
    assert (first.state, last.state) == (RequestState.RUNNING, RequestState.WAITING)
    timed.steps(1)
    assert (first.state, last.state) == (RequestState.WAITING, RequestState.RUNNING)
    timed.bench.run()
