"""Planning one step ahead of the results: what is planned, when it is not, and what becomes of rows that lost their
request. That the tokens are the same is shown in test_scheduler, and for random lives in test_scheduler_properties.
"""

from inferflux.engine.request import RequestState
from inferflux.engine.step import StepPlan
from tests.support.workbench import EOS, Workbench


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + 3 * i) % 50 for i in range(length)]


def ahead_of_decode(bench: Workbench) -> StepPlan:
    """Launches until two steps are in flight; returns the newer one's plan."""
    while len(bench.flights) < 2:
        assert bench.launch()
    return bench.plans[-1]


def test_a_decode_is_planned_before_its_token_is_known() -> None:
    bench = Workbench(ahead=True)
    request = bench.submit(prompt_of(9), 6, ignore_eos=True)
    (row,) = ahead_of_decode(bench).rows
    assert (row.start, row.token_ids, row.follows, row.sample) == (9, [0], True, True)
    assert len(request.tokens) == 9
    bench.run()


def test_chunks_of_a_prompt_are_planned_ahead_with_their_tokens() -> None:
    bench = Workbench(ahead=True, chunked_prefill_tokens=4)
    bench.submit(prompt_of(9), 6, ignore_eos=True)
    (row,) = ahead_of_decode(bench).rows
    assert (row.start, row.token_ids, row.follows, row.sample) == (4, prompt_of(9)[4:8], False, False)
    bench.run()


def test_nothing_is_planned_past_the_last_token() -> None:
    bench = Workbench(ahead=True)
    bench.submit(prompt_of(9), 2, ignore_eos=True)
    ahead_of_decode(bench)
    bench.land()
    assert not bench.launch()
    bench.run()
    assert len(bench.plans) == 2


def test_a_row_chosen_by_values_waits_for_them() -> None:
    """A penalty counts the tokens so far, so the next step is planned when the last one's results are in."""
    bench = Workbench(ahead=True)
    bench.submit(prompt_of(9), 6, ignore_eos=True)
    penalised = bench.submit(prompt_of(9, 20), 4, ignore_eos=True, frequency_penalty=0.5)
    bench.launch()
    while penalised.state is not RequestState.FINISHED:
        assert not bench.launch()
        bench.land()
        if penalised.state is not RequestState.FINISHED:
            assert bench.launch()
    assert not any(row.follows for plan in bench.plans for row in plan.rows)
    bench.run()
    assert any(row.follows for plan in bench.plans for row in plan.rows)


def test_a_row_planned_past_a_stop_token_is_dropped() -> None:
    bench = Workbench(ahead=True)
    request = next(
        request
        for start in range(50)
        if (request := bench.submit(prompt_of(3, start), 60)) and (bench.run() or request.finish_reason == "stop")
    )
    planned = [row for plan in bench.plans for row in plan.rows]
    assert bench.tokens_of(request)[-1] == EOS
    assert sum(row.sample for row in planned) > sum(len(bench.tokens_of(each)) for each in bench.requests.values())


def test_a_request_may_be_aborted_with_two_steps_in_flight() -> None:
    bench = Workbench(ahead=True)
    requests = [bench.submit(prompt_of(9, start), 8, ignore_eos=True) for start in range(2)]
    ahead_of_decode(bench)
    bench.scheduler.abort([requests[0].id])
    assert bench.kv.pool.num_used == len(requests[1].pages)
    assert [output.request_id for output in bench.land()] == [requests[1].id]
    late = bench.submit(prompt_of(30), 4)
    bench.run()
    assert late.state is RequestState.FINISHED


def test_a_failed_row_takes_the_one_planned_after_it_along() -> None:
    bench = Workbench(ahead=True)
    bad, good = bench.submit(prompt_of(9), 6), bench.submit(prompt_of(9, 20), 6, ignore_eos=True)
    bench.runner.failing.add(bad.id)
    bench.run()
    assert [output.error for output in bench.outputs[bad.id]] == ["out of luck"]
    assert good.finish_reason == "length"


def test_pages_too_short_for_all_are_not_planned_with_ahead() -> None:
    """So that nobody yields pages to a request that ends with the step in flight."""
    bench = Workbench(ahead=True, num_pages=12, page_tokens=2)
    for start in range(5):
        bench.submit(prompt_of(3, start), 20, ignore_eos=True)
    assert bench.launch()
    assert not bench.launch()
    bench.run()
    assert bench.scheduler.stats().preemptions > 0


def test_a_prefix_in_flight_is_waited_for() -> None:
    bench = Workbench(ahead=True, max_batch_tokens=200, page_tokens=4)
    bench.submit(prompt_of(18), 6, ignore_eos=True)
    assert bench.launch()
    second = bench.submit(prompt_of(18), 6, ignore_eos=True)
    assert bench.launch()
    assert second.state is RequestState.WAITING
    bench.run()
    assert second.num_cached == 16
