"""Whether a page is loaded or computed: what is measured, what is believed without it, and for how long."""

import pytest

from inferflux.engine.kv.rates import FIRST_TOKENS, MIN_PREFILL_TOKENS, RETRY_S, Rates

PAGE_TOKENS = 16


@pytest.fixture
def rates() -> Rates:
    """Prompts take 1 ms a token."""
    rates = Rates()
    rates.note_step(100, 100, 0.1)
    return rates


def test_what_was_never_measured_is_tried() -> None:
    rates = Rates()
    assert rates.prefers_load("cpu", PAGE_TOKENS, 0.0)
    rates.note_load("cpu", 1, 1000.0, 0.0)
    assert rates.prefers_load("cpu", PAGE_TOKENS, 0.0), "nobody knows yet what computing takes"


def test_the_faster_way_is_taken_for_each_tier(rates: Rates) -> None:
    rates.note_load("cpu", 10, 0.15, 0.0)  # 15 ms a page, computed in 16
    rates.note_load("nvme", 10, 0.17, 0.0)
    assert rates.prefers_load("cpu", PAGE_TOKENS, 0.0)
    assert not rates.prefers_load("nvme", PAGE_TOKENS, 0.0)


def test_the_slower_tier_is_tried_again_after_a_while(rates: Rates) -> None:
    rates.note_load("nvme", 1, 1.0, 5.0)
    assert not rates.prefers_load("nvme", PAGE_TOKENS, 5.0 + RETRY_S)
    assert rates.prefers_load("nvme", PAGE_TOKENS, 5.1 + RETRY_S)


def test_steps_that_are_mostly_decoding_say_nothing_of_prompts(rates: Rates) -> None:
    rates.note_step(MIN_PREFILL_TOKENS - 1, MIN_PREFILL_TOKENS - 1, 100.0)
    rates.note_step(MIN_PREFILL_TOKENS, 2 * MIN_PREFILL_TOKENS, 100.0)
    assert rates.prefill_s_per_token == pytest.approx(0.001)
    rates.note_step(100, 100, 0.2)
    assert rates.prefill_s_per_token == pytest.approx(0.0012)


def test_a_load_has_twice_the_time_of_computing_and_a_second_at_least(rates: Rates) -> None:
    assert rates.patience_s(4000) == pytest.approx(8.0)
    assert rates.patience_s(10) == 1.0
    assert Rates().patience_s(1000) > 1.0


def test_what_a_step_may_take_on_follows_what_prompts_take(rates: Rates) -> None:
    assert rates.tokens_within(10.0) == 10_000
    assert rates.tokens_within(0.001) == MIN_PREFILL_TOKENS, "fewer would not be measured"
    assert Rates().tokens_within(10.0) == FIRST_TOKENS
    instant = Rates()
    instant.note_step(100, 100, 0.0)
    assert instant.tokens_within(10.0) > 10**9
