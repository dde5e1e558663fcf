"""The scheduler against an oracle: whatever is batched, cut, shared or preempted, each request says the same."""

from typing import Any

import pytest

from inferflux.config import FairnessConfig
from inferflux.engine.kv.rates import FIRST_TOKENS
from inferflux.engine.request import Request, RequestState
from inferflux.engine.scheduler.policies import AGE_STEP_S
from inferflux.engine.scheduler.step_planner import LONGEST_STEP_S, MAX_PASSED_OVER
from inferflux.engine.step import StepOutput
from inferflux.errors import RequestError
from tests.support.fake_runner import next_token, score_of
from tests.support.workbench import EOS, Workbench

PROMPT_LENGTHS = (1, 15, 16, 17, 33, 300)

SETTINGS = {
    "roomy": {"num_pages": 200},
    "one at a time": {"num_pages": 200, "max_batch_size": 1},
    "chunks of 7": {"num_pages": 200, "chunked_prefill_tokens": 7},
    "no prefix cache": {"num_pages": 200, "prefix_cache": False},
    "budget of 9": {"num_pages": 200, "max_batch_tokens": 9},
    "just fits": {"num_pages": 24},
    "just fits, chunks of 7": {"num_pages": 24, "chunked_prefill_tokens": 7},
    "just fits, no prefix cache": {"num_pages": 24, "prefix_cache": False},
    "pages of one token": {"num_pages": 400, "page_tokens": 1},
    "priorities": {"num_pages": 24, "policy": "priority_age"},
    "fair": {"num_pages": 24, "policy": "fair"},
    "longest prefix": {"num_pages": 24, "policy": "longest_prefix"},
    "drafts": {"num_pages": 200, "drafts": 3},
    "drafts, just fits": {"num_pages": 24, "drafts": 5},
    "drafts, three rows": {"num_pages": 200, "drafts": 2, "max_batch_size": 3},
    "timeslices": {"num_pages": 24, "max_batch_size": 2, "fairness": FairnessConfig(max_timeslice_tokens=3)},
}


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + 3 * i) % 50 for i in range(length)]


def waited_s(request: Request) -> float:
    assert request.first_scheduled_time is not None
    return request.first_scheduled_time - request.arrival_time


@pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_output_equals_the_oracle(settings: dict[str, Any], ahead: bool) -> None:
    bench = Workbench(**{"page_tokens": 16, "max_batch_tokens": 128, "ahead": ahead, **settings})
    for start in range(2):
        for number, length in enumerate(PROMPT_LENGTHS):
            bench.submit(prompt_of(length, start), 64, ignore_eos=number % 2 == 0, priority=number)
    bench.run()
    for length in PROMPT_LENGTHS:
        bench.submit(prompt_of(length), 64)
    bench.run()
    assert all(request.state is RequestState.FINISHED for request in bench.requests.values())


def test_a_small_pool_preempts_and_still_tells_the_truth() -> None:
    bench = Workbench(num_pages=12, page_tokens=2)
    for start in range(5):
        bench.submit(prompt_of(3, start), 20, ignore_eos=True)
    bench.run()
    stats = bench.scheduler.stats()
    assert stats.preemptions > 0
    assert sum(request.num_preemptions for request in bench.requests.values()) == stats.preemptions


def test_a_preempted_request_resumes_from_its_own_cached_pages() -> None:
    bench = Workbench(num_pages=10, page_tokens=2, max_batch_tokens=64)
    first, second = (bench.submit(prompt_of(6, start), 12, ignore_eos=True) for start in (0, 9))
    while not second.num_preemptions:
        bench.step()
    assert second.state is RequestState.WAITING
    assert not second.pages
    bench.run()
    resumed = [start for plan in bench.plans for start in plan.starts if start.request_id == second.id]
    assert len(resumed) == 1 + second.num_preemptions
    assert resumed[1].history[:6] == second.prompt_token_ids
    assert resumed[1].num_prompt_tokens == 6
    assert first.num_preemptions == 0
    assert bench.scheduler.stats().prefix_query_tokens == 12, "resuming is not a query of the user's"


def test_the_oldest_request_is_never_preempted() -> None:
    bench = Workbench(num_pages=9, page_tokens=1, chunked_prefill_tokens=2)
    requests = [bench.submit(prompt_of(3, start), 6, ignore_eos=True) for start in range(4)]
    while bench.scheduler.has_work:
        oldest = min((r for r in requests if r.state is RequestState.RUNNING), key=lambda r: r.id, default=None)
        before = None if oldest is None else (oldest.num_computed, oldest.num_preemptions)
        bench.step()
        if oldest is not None and before is not None and oldest.state is RequestState.RUNNING:
            assert oldest.num_computed > before[0]
            assert oldest.num_preemptions == before[1]


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    bench = Workbench(num_pages=12, page_tokens=1, max_batch_size=2, policy="priority_age")
    low = bench.submit(prompt_of(5), 7, ignore_eos=True)
    bench.submit(prompt_of(3, 1), 9, priority=5, ignore_eos=True)
    bench.step()
    middle = bench.submit([1], 2, priority=3, ignore_eos=True)
    while not low.num_preemptions:
        assert middle.state is RequestState.WAITING, "both slots are taken"
        bench.step()
    assert middle.state is RequestState.WAITING, "a slot and pages have just become free, but in the middle of the step"
    bench.step()
    assert middle.state is RequestState.RUNNING
    bench.run()


def test_admission_leaves_room_for_what_runs() -> None:
    """Two requests that only fit one after the other run one after the other: nobody is preempted."""
    bench = Workbench(num_pages=6, page_tokens=4, chunked_prefill_tokens=4)
    bench.submit(prompt_of(16), 4, ignore_eos=True)
    bench.step()
    bench.submit(prompt_of(16, 1), 4, ignore_eos=True)
    bench.run()
    assert bench.scheduler.stats().preemptions == 0


def test_a_request_that_fills_the_pool_ends_with_length() -> None:
    bench = Workbench(num_pages=3, page_tokens=4)
    request = bench.submit(prompt_of(5), 100, ignore_eos=True)
    other = bench.submit(prompt_of(3, 1), 2, ignore_eos=True)
    bench.run()
    assert request.finish_reason == other.finish_reason == "length"
    assert len(request.tokens) == 13, "the pool's 12 tokens and the one that need not be computed"


def test_a_prompt_too_long_for_the_pool_is_refused() -> None:
    bench = Workbench(num_pages=3, page_tokens=4)
    with pytest.raises(RequestError, match="prompt: has 12 tokens") as error:
        bench.submit(prompt_of(12))
    assert error.value.param == "prompt"
    assert not bench.scheduler.has_work
    bench.submit(prompt_of(11), ignore_eos=True)
    bench.run()


def test_an_id_in_use_is_refused() -> None:
    bench = Workbench()
    request = bench.submit(prompt_of(3))
    with pytest.raises(RequestError, match="running already"):
        bench.scheduler.add(request)
    bench.run()
    assert bench.scheduler.stats().running == 0


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    bench = Workbench(num_pages=100, max_batch_tokens=10, chunked_prefill_tokens=6)
    bench.submit(prompt_of(4), 30, ignore_eos=True)
    bench.step()
    long = bench.submit(prompt_of(40, 1), 2, ignore_eos=True)
    bench.submit(prompt_of(40, 2), 2, ignore_eos=True)
    plan = bench.schedule()
    assert plan is not None
    assert [len(row.token_ids) for row in plan.rows] == [1, 6, 3]
    assert plan.rows[1].slot == long.slot
    bench.update(plan)
    bench.run()


def test_a_slow_machine_computes_no_more_of_prompts_at_once_than_it_can_in_time() -> None:
    """Silent for a minute, an engine is taken for stuck, killed, and given the same prompts again."""
    bench = Workbench(num_pages=400, page_tokens=16, max_batch_tokens=2048, chunked_prefill_tokens=512)
    for start in range(4):
        bench.submit(prompt_of(1000 + start, start), 2, ignore_eos=True)
    steps = []
    while (plan := bench.schedule()) is not None:
        steps.append(plan.num_tokens)
        bench.clock += 0.2 * plan.num_tokens  # seconds
        bench.update(plan)
    assert steps[0] == FIRST_TOKENS
    assert all(0.2 * num_tokens < 1.1 * LONGEST_STEP_S for num_tokens in steps[1:])
    assert len(steps) < 120, "nor much less than that"


def test_rows_never_outnumber_the_budget() -> None:
    bench = Workbench(max_batch_tokens=3, max_batch_size=8)
    for start in range(5):
        bench.submit(prompt_of(2, start), 5, ignore_eos=True)
    bench.run()
    assert max(len(plan.rows) for plan in bench.plans) == 3


def test_slots_are_the_smallest_free_ones() -> None:
    bench = Workbench(max_batch_size=3)
    requests = [bench.submit(prompt_of(2, start), 5, ignore_eos=True) for start in range(3)]
    bench.step()
    assert [request.slot for request in requests] == [0, 1, 2]
    bench.scheduler.abort([requests[2].id, requests[0].id])
    late = bench.submit(prompt_of(2, 9), 5, ignore_eos=True)
    bench.step()
    assert late.slot == 0
    bench.run()


def test_equal_prompts_at_once_are_computed_once() -> None:
    bench = Workbench(num_pages=100, page_tokens=4, chunked_prefill_tokens=8)
    for _ in range(4):
        bench.submit(prompt_of(22), 3, ignore_eos=True)
    other = bench.submit(prompt_of(5, 30), 3, ignore_eos=True)
    bench.step()
    assert other.state is RequestState.RUNNING, "passed-over requests do not block others"
    bench.run()
    cached = [bench.requests[i].num_cached for i in (1, 2, 3, 4)]
    assert cached == [0, 20, 20, 20]
    assert bench.outputs[2][0].num_cached_tokens == 20


def test_more_waiters_for_one_prefix_than_are_passed_over_all_finish() -> None:
    bench = Workbench(num_pages=200, max_batch_size=64, chunked_prefill_tokens=4)
    for _ in range(2 * MAX_PASSED_OVER):
        bench.submit(prompt_of(18), 2, ignore_eos=True)
    bench.run()
    assert bench.scheduler.stats().prefix_hit_tokens == (2 * MAX_PASSED_OVER - 1) * 16


@pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])
def test_no_token_of_a_prompt_is_computed_alone(ahead: bool) -> None:
    """By the attention for decodes its last bits would be others, depending on whom the step was shared with."""
    bench = Workbench(ahead=ahead, num_pages=400, max_batch_tokens=16, chunked_prefill_tokens=8, max_batch_size=16)
    for length in range(1, 36):
        bench.submit(prompt_of(length, length), 12, ignore_eos=True)
        bench.submit(prompt_of(length, 17), 5, ignore_eos=True)
    bench.run()
    alone, in_prompt = [], set()
    for plan in bench.plans:
        in_prompt |= {start.slot for start in plan.starts}
        prompt_rows = [row for row in plan.rows if row.slot in in_prompt]
        alone += [row.start for row in prompt_rows if len(row.token_ids) == 1]
        in_prompt -= {row.slot for row in prompt_rows if row.sample}
    assert alone == [0, 0], "the prompts of one token"


def test_waiters_go_on_when_the_request_they_wait_for_is_aborted() -> None:
    bench = Workbench(chunked_prefill_tokens=4)
    first, second = bench.submit(prompt_of(17)), bench.submit(prompt_of(17))
    bench.step()
    assert second.state is RequestState.WAITING
    bench.scheduler.abort([first.id])
    bench.step()
    assert second.num_cached == 4, "what the first had computed is of use"
    bench.run()


def test_a_fully_cached_prompt_computes_its_last_page_again_in_a_page_of_its_own() -> None:
    bench = Workbench(page_tokens=4)
    bench.submit(prompt_of(16), 2, ignore_eos=True)
    bench.run()
    again = bench.submit(prompt_of(16), 9, ignore_eos=True)
    plan = bench.schedule()
    assert plan is not None
    assert again.num_cached == 12
    assert plan.rows[0].start == 12
    bench.update(plan)
    bench.run()


def test_one_tenant_never_finds_the_pages_of_another() -> None:
    bench = Workbench()
    for salt in (b"a", b"b", b"a", b"b"):
        bench.submit(prompt_of(18), 2, salt=salt, ignore_eos=True)
        bench.run()
    assert [request.num_cached for request in bench.requests.values()] == [0, 0, 16, 16]


def test_without_prefix_cache_nothing_stays() -> None:
    bench = Workbench(prefix_cache=False)
    for _ in range(2):
        bench.submit(prompt_of(17), 2)
        bench.run()
    stats = bench.scheduler.stats()
    assert stats.device_pages_cached == stats.prefix_hit_tokens == stats.prefix_query_tokens == 0


def test_abort_while_waiting_running_planned_and_unknown() -> None:
    bench = Workbench(max_batch_size=2)
    running, planned, waiting = (bench.submit(prompt_of(9, start), 20, ignore_eos=True) for start in range(3))
    bench.step()
    bench.scheduler.abort([waiting.id, running.id, 999])
    bench.scheduler.check_integrity()
    plan = bench.schedule()
    assert plan is not None
    bench.scheduler.abort([planned.id, planned.id])
    assert bench.update(plan) == []
    assert not bench.scheduler.has_work
    assert bench.scheduler.schedule() is None
    assert bench.kv.pool.num_used == 0
    assert {r.finish_reason for r in (running, planned, waiting)} == {"abort"}


def test_an_aborted_row_does_not_disturb_the_others_of_its_step() -> None:
    bench = Workbench()
    requests = [bench.submit(prompt_of(9, start), 6, ignore_eos=True) for start in range(3)]
    bench.step()
    plan = bench.schedule()
    assert plan is not None
    bench.scheduler.abort([requests[1].id])
    assert [output.request_id for output in bench.update(plan)] == [requests[0].id, requests[2].id]
    bench.run()


def test_a_lost_step_can_be_left_behind_by_aborting_all() -> None:
    """An interrupted LLM.generate never calls update; after an abort of everything the engine goes on."""
    bench = Workbench()
    lost = bench.submit(prompt_of(9))
    assert bench.schedule() is not None
    assert bench.schedule() is not None, "a step may be planned ahead"
    with pytest.raises(AssertionError, match="still due"):
        bench.scheduler.schedule()
    bench.scheduler.abort([lost.id])
    bench.submit(prompt_of(9))
    bench.run()


def test_a_failed_row_ends_its_request_only() -> None:
    bench = Workbench()
    bad, good = bench.submit(prompt_of(9), 6), bench.submit(prompt_of(9, 20), 6)
    bench.runner.failing.add(bad.id)
    bench.run()
    (output,) = bench.outputs[bad.id]
    assert (output.finish_reason, output.error, output.token_ids) == ("error", "out of luck", [])
    assert output.queue_s == 0.0
    assert bad.finish_reason == "error"
    assert good.finish_reason in ("stop", "length")


def test_stop_rules() -> None:
    prompt = prompt_of(4)
    context, stream = list(prompt), []
    for _ in range(200):
        stream.append(next_token(context, 0))
        context.append(stream[-1])
    bench = Workbench(num_pages=200)
    by_id = bench.submit(prompt, 200, ignore_eos=True, stop_token_ids=(stream[5],))
    held = bench.submit(prompt, 200, ignore_eos=True, stop_token_ids=(stream[5],), min_tokens=6)
    one = bench.submit(prompt, 1, ignore_eos=True)
    by_eos = bench.submit(prompt, 200)
    bench.run()
    first = stream.index(stream[5])
    assert bench.tokens_of(by_id) == stream[: first + 1]
    assert bench.outputs[by_id.id][-1].stop_token_id == stream[5]
    assert len(bench.tokens_of(held)) > 6
    assert (bench.tokens_of(one), one.finish_reason) == (stream[:1], "length")
    assert bench.outputs[one.id][-1].stop_token_id is None
    assert EOS in stream
    assert bench.tokens_of(by_eos) == stream[: stream.index(EOS) + 1]


def test_first_output_carries_the_wait_and_later_ones_do_not() -> None:
    bench = Workbench(max_batch_size=1)
    bench.submit(prompt_of(3), 4, ignore_eos=True)
    waiter = bench.submit(prompt_of(3, 1), 3, ignore_eos=True)
    bench.run()
    assert [output.queue_s for output in bench.outputs[waiter.id]] == [4.0, None, None]


@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_tokens": 7}, {"chunked_prefill_tokens": 1}])
def test_prompt_logprobs_are_collected_over_chunks_and_told_once(settings: dict[str, Any]) -> None:
    bench = Workbench(**settings)
    prompt = prompt_of(24)
    bench.submit(prompt, 2, ignore_eos=True)
    bench.run()
    scored = bench.submit(prompt, 3, prompt_logprobs=0, ignore_eos=True)
    single = bench.submit([5], 2, prompt_logprobs=0, ignore_eos=True)
    bench.run()
    assert scored.num_cached == 0, "the prompt's logits are needed, so nothing is read from the cache"
    told = [output.prompt_logprobs for output in bench.outputs[scored.id]]
    assert told == [[score_of(prompt[:i], prompt[i]) for i in range(1, 24)], None, None]
    assert [output.prompt_logprobs for output in bench.outputs[single.id]] == [[], None]
    assert len(bench.outputs[scored.id][1].logprobs or []) == 1


def test_an_aborted_request_leaves_no_scores_behind() -> None:
    bench = Workbench(chunked_prefill_tokens=3)
    scored = bench.submit(prompt_of(9), prompt_logprobs=0)
    bench.step()
    bench.scheduler.abort([scored.id])
    bench.scheduler.check_integrity()


def test_prompt_logprobs_survive_preemption() -> None:
    bench = Workbench(num_pages=12, page_tokens=2, chunked_prefill_tokens=3)
    prompts = [prompt_of(7, start) for start in range(4)]
    requests = [bench.submit(prompt, 12, ignore_eos=True, prompt_logprobs=0) for prompt in prompts]
    bench.run()
    assert bench.scheduler.stats().preemptions > 0
    for request, prompt in zip(requests, prompts, strict=True):
        told = [output.prompt_logprobs for output in bench.outputs[request.id] if output.prompt_logprobs is not None]
        assert told == [[score_of(prompt[:i], prompt[i]) for i in range(1, 7)]]


def test_priority_goes_first_and_age_catches_up() -> None:
    bench = Workbench(max_batch_size=1, policy="priority_age")
    low = bench.submit(prompt_of(2), 2, ignore_eos=True)
    high = bench.submit(prompt_of(2, 1), 2, priority=1, ignore_eos=True)
    bench.run()
    assert waited_s(low) > waited_s(high)
    low = bench.submit(prompt_of(2), 2, ignore_eos=True)
    bench.clock += AGE_STEP_S + 1
    high = bench.submit(prompt_of(2, 1), 2, priority=1, ignore_eos=True)
    bench.step()
    assert (low.state, high.state) == (RequestState.RUNNING, RequestState.WAITING)
    bench.run()


def test_the_lowest_priority_yields_its_pages() -> None:
    bench = Workbench(num_pages=12, page_tokens=1, policy="priority_age")
    low, high = bench.submit(prompt_of(3), 8, ignore_eos=True), bench.submit(prompt_of(3, 1), 8, priority=5)
    bench.run()
    assert low.num_preemptions > 0
    assert high.num_preemptions == 0


def test_a_large_request_is_not_starved_by_small_ones_behind_it() -> None:
    bench = Workbench(num_pages=10, page_tokens=2)
    bench.submit(prompt_of(4), 10, ignore_eos=True)
    bench.step()
    large = bench.submit(prompt_of(15, 1), 2, ignore_eos=True)
    small = bench.submit(prompt_of(2, 2), 2, ignore_eos=True)
    bench.run()
    assert waited_s(large) <= waited_s(small)


def test_a_blocked_queue_costs_no_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no page is given back, waiting requests that cannot be admitted are not looked at again."""
    bench = Workbench(num_pages=10, page_tokens=2)
    bench.submit(prompt_of(4), 12, ignore_eos=True)
    bench.step()
    for start in range(20):
        bench.submit(prompt_of(15, 1 + start), 2)
    bench.step()
    monkeypatch.setattr(bench.kv, "match_prefix", lambda request: pytest.fail("looked at the queue"))
    for _ in range(5):
        bench.step()
    monkeypatch.undo()
    bench.run()


def test_stats_count() -> None:
    bench = Workbench(num_pages=40, page_tokens=4)
    for _ in range(2):
        bench.submit(prompt_of(10), 3, ignore_eos=True)
        bench.run()
    bench.submit(prompt_of(5, 20), 5, ignore_eos=True)
    bench.submit(prompt_of(5, 30), 5, ignore_eos=True)
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.running, stats.waiting, stats.batch_tokens, stats.steps) == (2, 0, 10, 7)
    assert stats.generation_tokens == 8
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (30, 8)
    assert (stats.device_pages_total, stats.device_pages_in_use, stats.device_pages_cached) == (40, 4, 3)
    bench.run()


def test_results_of_another_step_are_our_mistake() -> None:
    bench = Workbench()
    bench.submit(prompt_of(3))
    plan = bench.schedule()
    assert plan is not None
    with pytest.raises(AssertionError, match="another step"):
        bench.scheduler.update(plan, StepOutput(plan.step_id + 1, []))
