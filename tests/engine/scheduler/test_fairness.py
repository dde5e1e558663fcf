"""Who goes first and who makes room: the policies, preemption and timeslices, on a simulated clock."""

import pytest

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request, RequestState
from inferflux.engine.scheduler.order import Order
from inferflux.engine.scheduler.policies import PATIENCE_S, policy_named
from inferflux.engine.scheduler.tenants import OUTPUT_TOKEN, TenantCounters
from inferflux.errors import ConfigError
from inferflux.sampling_params import SamplingParams
from tests.support.workbench import Workbench

WAITING, RUNNING = RequestState.WAITING, RequestState.RUNNING


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + 3 * i + i * i * start) % 50 for i in range(length)]


def test_tenants_with_enough_to_do_are_served_alike() -> None:
    """The bound that "Fairness in Serving Large Language Models" proves: whatever the requests look like, the services
    of two tenants that always have some waiting differ by at most 2 * max(prompt, weight * tokens in the batch)."""
    num_rows, most_tokens = 4, 60
    bench = Workbench(num_pages=400, max_batch_size=num_rows, policy="fair", prefix_cache=False)
    for number in range(60):
        bench.submit(prompt_of(30, number), 30, tenant="long", ignore_eos=True)
        bench.submit(prompt_of(4, number), 5, tenant="short", ignore_eos=True)
        bench.submit(prompt_of(4, number), 5, tenant="short", ignore_eos=True)
    served = {"long": 0, "short": 0}
    while all(any(r.state is WAITING for r in bench.requests.values() if r.tenant == name) for name in served):
        bench.step()
        for name in served:
            mine = [r for r in bench.requests.values() if r.tenant == name]
            started = [r for r in mine if r.first_scheduled_time is not None]
            prompts = sum(r.num_prompt_tokens for r in started)
            served[name] = prompts + OUTPUT_TOKEN * sum(r.num_output_tokens for r in mine)
        assert abs(served["long"] - served["short"]) <= 2 * OUTPUT_TOKEN * num_rows * most_tokens
    assert min(served.values()) > 1000, "long enough to tell"
    bench.run()


def test_who_comes_back_has_saved_up_nothing_and_escapes_nothing() -> None:
    tenants = TenantCounters()
    tenants.enter("busy")
    tenants.charge("busy", 1000)
    tenants.enter("new")
    assert tenants.served("new") == 1000
    tenants.charge("new", 50)
    tenants.leave("new")
    tenants.enter("new")
    assert tenants.served("new") == 1050, "leaving does not wipe the slate"
    for name in ("new", "busy"):
        tenants.leave(name)
    tenants.enter("third")
    assert tenants.served("third") >= 1000, "in an empty house the last who left sets the mark"


def test_a_tenant_with_one_request_left_is_no_longer_among_those_with_several() -> None:
    """Tenants are favoured by comparison with the least served of those with several requests."""
    tenants = TenantCounters()
    tenants.enter("a")
    tenants.enter("a")
    assert tenants.least_served_of_others == 0
    tenants.leave("a")
    assert tenants.least_served_of_others is None
    assert tenants.singles(limit=0, most=2) == ["a"]


def test_counters_do_not_grow_with_every_tenant_ever_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferflux.engine.scheduler.tenants.MAX_REMEMBERED", 10)
    tenants = TenantCounters()
    for number in range(1000):
        tenants.enter(str(number))
        tenants.charge(str(number), 7)
        tenants.leave(str(number))
    assert len(tenants._served) <= 11


def test_a_tenant_that_is_here_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has had the least of all: its next token is charged to it."""
    monkeypatch.setattr("inferflux.engine.scheduler.tenants.MAX_REMEMBERED", 10)
    tenants = TenantCounters()
    tenants.enter("stays")
    for number in range(100):
        tenants.enter(str(number))
        tenants.charge(str(number), 7)
        tenants.leave(str(number))
    tenants.charge("stays", 1)
    assert tenants.served("stays") == 1


@pytest.mark.parametrize("policy", ["priority_age", "fcfs", "fair", "longest_prefix"])
def test_high_priority_takes_a_place_and_gives_it_back(policy: str) -> None:
    bench = Workbench(max_batch_size=2, policy=policy, fairness=FairnessConfig(high_priority_threshold=5))
    low = [bench.submit(prompt_of(4, n), 20, ignore_eos=True) for n in range(4)]
    bench.step()
    usual = bench.submit(prompt_of(4, 7), 3, priority=4, ignore_eos=True)
    bench.step()
    assert usual.state is WAITING, "a priority below the threshold takes nobody's place"
    high = bench.submit(prompt_of(4, 9), 3, priority=5, ignore_eos=True)
    bench.step()
    assert high.state is RUNNING
    assert [request.state for request in low] == [RUNNING, WAITING, WAITING, WAITING]
    bench.run()
    assert sum(request.num_preemptions for request in low) == 1
    assert high.num_preemptions == 0


def test_without_preemption_everybody_waits_for_a_place() -> None:
    for policy in ("priority_age", "fair"):
        bench = Workbench(max_batch_size=2, policy=policy, fairness=FairnessConfig(enable_preemption=False))
        for n in range(3):
            bench.submit(prompt_of(4, n), 20, tenant="a", ignore_eos=True)
        bench.step()
        bench.submit(prompt_of(4, 9), 3, priority=100, tenant="b", ignore_eos=True)
        bench.run()
        assert bench.scheduler.stats().preemptions == 0


def test_under_priority_age_nobody_starves_however_much_of_high_priority_comes() -> None:
    bench = Workbench(max_batch_size=1, policy="priority_age", fairness=FairnessConfig(high_priority_threshold=3))
    low = bench.submit(prompt_of(4), 4, ignore_eos=True)
    for number in range(100):
        bench.submit(prompt_of(4, number), 2, priority=3, ignore_eos=True)
        bench.step()
        bench.step()
        if low.state is RequestState.FINISHED:
            break
    assert low.state is RequestState.FINISHED
    assert low.num_preemptions <= 1
    bench.run()


def test_high_priority_takes_pages_too() -> None:
    bench = Workbench(num_pages=8, page_tokens=2, max_batch_size=8, fairness=FairnessConfig(high_priority_threshold=1))
    low = bench.submit(prompt_of(8), 8, ignore_eos=True)
    bench.step()
    high = bench.submit(prompt_of(8, 5), 4, priority=1, ignore_eos=True)
    for _ in range(3):
        bench.step()
    assert (high.state, low.state) == (RUNNING, WAITING)
    bench.run()


def test_fair_places_are_shared_and_never_passed_back() -> None:
    bench = Workbench(max_batch_size=4, policy="fair", num_pages=200)
    for name in ("a", "b"):
        for n in range(6):
            bench.submit(prompt_of(4, n + ord(name)), 40, tenant=name, ignore_eos=True)
        bench.step()
    for _ in range(20):
        bench.step()
    running = [request.tenant for request in bench.requests.values() if request.state is RUNNING]
    assert sorted(running) == ["a", "a", "b", "b"]
    assert bench.scheduler.stats().preemptions == 2
    bench.run()


def test_timeslices_make_turns() -> None:
    bench = Workbench(max_batch_size=1, fairness=FairnessConfig(max_timeslice_tokens=3))
    first = bench.submit(prompt_of(4), 9, ignore_eos=True)
    for _ in range(5):
        bench.step()
    assert first.num_preemptions == 0, "as long as nobody waits there is no need to stop"
    second = bench.submit(prompt_of(4, 1), 9, ignore_eos=True)
    seen = []
    while bench.scheduler.has_work:
        seen += [output.request_id for output in bench.step()]
    assert seen == [second.id] * 3 + [first.id] * 3 + [second.id] * 3 + [first.id] + [second.id] * 3
    bench.run()


def test_a_turn_of_higher_priority_goes_on() -> None:
    bench = Workbench(max_batch_size=1, fairness=FairnessConfig(max_timeslice_tokens=1))
    high = bench.submit(prompt_of(4), 9, priority=5, ignore_eos=True)
    bench.submit(prompt_of(4, 1), 9, ignore_eos=True)
    bench.run()
    assert high.num_preemptions == 0


@pytest.mark.parametrize("policy", ["fair", "longest_prefix", "fcfs", "priority_age"])
def test_timeslices_end_under_every_policy(policy: str) -> None:
    bench = Workbench(max_batch_size=2, policy=policy, fairness=FairnessConfig(max_timeslice_tokens=2), num_pages=100)
    requests = [bench.submit(prompt_of(9, n % 2), 12, tenant=str(n % 3), ignore_eos=True) for n in range(6)]
    for _ in range(24):
        bench.step()
    assert min(request.num_output_tokens for request in requests) > 0, "everyone had a turn"
    bench.run()


def test_longest_prefix_first_but_not_for_ever() -> None:
    bench = Workbench(max_batch_size=1, policy="longest_prefix", num_pages=100)
    bench.submit(prompt_of(24), 2, ignore_eos=True)
    bench.run()
    busy = bench.submit([1], 4, ignore_eos=True)
    bench.step()
    cold = bench.submit(prompt_of(24, 9), 2, ignore_eos=True)
    some = bench.submit(prompt_of(8) + [44] * 8, 2, ignore_eos=True)
    most = bench.submit(prompt_of(24), 2, ignore_eos=True)
    order: list[int] = []
    while bench.scheduler.has_work:
        for output in bench.step():
            if output.finish_reason:
                order.append(output.request_id)
    assert order == [busy.id, most.id, some.id, cold.id]
    bench.submit([1], 4, ignore_eos=True)
    bench.step()
    cold = bench.submit(prompt_of(24, 11), 2, ignore_eos=True)
    bench.clock += PATIENCE_S
    bench.submit(prompt_of(24), 2, ignore_eos=True)
    while cold.state is WAITING:
        bench.step()
    assert [r.id for r in bench.requests.values() if r.state is WAITING] == [cold.id + 1]
    bench.run()


def test_another_policy_counts_for_who_waits_already() -> None:
    bench = Workbench(max_batch_size=1, policy="fcfs")
    bench.submit(prompt_of(4), 4, ignore_eos=True)
    bench.step()
    low = bench.submit(prompt_of(4, 1), 2, ignore_eos=True)
    high = bench.submit(prompt_of(4, 2), 2, priority=1, ignore_eos=True)
    bench.scheduler.configure("priority_age", FairnessConfig())
    bench.scheduler.check_integrity()
    while low.state is WAITING and high.state is WAITING:
        bench.step()
    assert high.state is RUNNING
    with pytest.raises(ConfigError, match="did you mean"):
        bench.scheduler.configure("fare", FairnessConfig())
    bench.run()


def test_a_long_queue_is_not_looked_up_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferflux.engine.scheduler.order.MAX_LOOKED_UP", 2)
    looked_up = []
    order = Order(
        SchedulerConfig(policy="longest_prefix"),
        FairnessConfig(),
        lambda request: looked_up.append(request.id) or 0,
        lambda: 0.0,
    )
    queue = [Request(n, [1], SamplingParams(), 0, 9, arrival_time=float(-n)) for n in range(5)]
    order.sort(queue)
    assert looked_up == [4, 3]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'priority_age, fcfs, fair, longest_prefix .*did you mean "fair"'):
        policy_named("fairr")


def test_a_start_skips_nobody_though_it_changes_the_order() -> None:
    """One of tenant a's waits for a page that is being computed; another starts, and then it is b's turn."""
    bench = Workbench(page_tokens=4, policy="fair", max_batch_tokens=24, chunked_prefill_tokens=24)
    shared = prompt_of(32)
    bench.submit(shared, tenant="a", ignore_eos=True)
    bench.step()
    waits = bench.submit([*shared, 1], tenant="a", ignore_eos=True)
    starts = bench.submit(prompt_of(8, 1), tenant="a", ignore_eos=True)
    first, second, third = (bench.submit(prompt_of(8, 2 + i), tenant="b", ignore_eos=True) for i in range(3))
    bench.step()
    assert [one.state for one in (waits, starts, first)] == [WAITING, RUNNING, RUNNING]
    assert [one.state for one in (second, third)] == [WAITING, WAITING], "the step is full"
    bench.run()


@pytest.mark.parametrize("max_timeslice_tokens", [0, 2])
def test_prefixes_are_looked_up_only_when_it_matters(
    monkeypatch: pytest.MonkeyPatch, max_timeslice_tokens: int
) -> None:
    """While no place is free and none can be taken, how those that wait stand is of no matter."""
    looked_up = []
    find = KVManager.match_prefix
    monkeypatch.setattr(
        KVManager, "match_prefix", lambda kv, request: looked_up.append(request.id) or find(kv, request)
    )
    fairness = FairnessConfig(max_timeslice_tokens=max_timeslice_tokens)
    bench = Workbench(max_batch_size=1, policy="longest_prefix", fairness=fairness)
    bench.submit(prompt_of(4), 12, ignore_eos=True)
    bench.step()
    waiting = [bench.submit(prompt_of(4, 1 + i), 2, ignore_eos=True) for i in range(3)]
    looked_up.clear()
    bench.step()
    assert sorted(looked_up) == ([one.id for one in waiting] if max_timeslice_tokens else [])
    bench.run()
    assert set(looked_up) >= {one.id for one in waiting}
