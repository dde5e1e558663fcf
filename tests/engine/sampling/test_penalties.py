"""Penalties against their definitions: transformers' processor for repetition, plain counting for the others."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from inferflux.engine.sampling.penalties import PenaltyState, apply_penalties
from inferflux.engine.step import RowStart
from inferflux.sampling_params import SamplingParams

VOCAB = 40


def make_state(history: list[int], num_prompt_tokens: int, **params: float) -> PenaltyState:
    state = PenaltyState.of(RowStart(0, 0, SamplingParams(**params), 0, history, num_prompt_tokens, []))
    assert state is not None
    return state


def penalised(logits: torch.Tensor, *states: PenaltyState, rows: list[int]) -> torch.Tensor:
    logits = logits.clone()
    apply_penalties(logits, np.array(rows), states)
    return logits


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_equals_transformers(penalty: float):
    logits = torch.randn(2, VOCAB)
    histories = [[1, 2, 3, 3, 39], [0, 7, 7, 1, 5]]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(histories), logits.clone())
    states = [make_state(history, 3, repetition_penalty=penalty) for history in histories]
    torch.testing.assert_close(penalised(logits, *states, rows=[0, 1]), expected)


def test_presence_and_frequency_count_output_tokens_only():
    logits = torch.randn(1, VOCAB)
    history, num_prompt_tokens = [1, 1, 2, 3, 2, 2, 9], 4
    expected = logits.clone()
    for token_id, count in Counter(history[num_prompt_tokens:]).items():
        expected[0, token_id] -= 0.7 + -0.4 * count
    state = make_state(history, num_prompt_tokens, presence_penalty=0.7, frequency_penalty=-0.4)
    torch.testing.assert_close(penalised(logits, state, rows=[0]), expected)


def test_repetition_comes_before_the_others_and_other_rows_stay():
    logits = torch.tensor([[1.0, 2.0, -2.0]]).repeat(3, 1)
    state = make_state([1, 2], 1, repetition_penalty=2.0, frequency_penalty=0.5)
    result = penalised(logits, state, rows=[1])
    assert result.tolist() == [[1.0, 2.0, -2.0], [1.0, 1.0, -4.5], [1.0, 2.0, -2.0]]


def test_observing_one_by_one_equals_starting_with_the_whole_history():
    """As after a preemption; with enough distinct tokens to outgrow the first arrays."""
    prompt, output = [5, 5, 6], [7, 5, 7, *range(100, 300), 7]
    settings = {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    grown = make_state(prompt, 3, **settings)
    for index, token_id in enumerate(output):
        grown.observe(3 + index, [token_id])
    whole = make_state(prompt + output, 3, **settings)
    logits = torch.randn(1, 300)
    torch.testing.assert_close(penalised(logits, grown, rows=[0]), penalised(logits, whole, rows=[0]))


def test_observing_what_the_history_has_changes_nothing():
    state = make_state([1, 2, 3], 2, frequency_penalty=1.0)
    state.observe(0, [1, 2, 3])
    state.observe(2, [3, 4])
    assert dict(zip(state.ids.tolist(), state.counts.tolist(), strict=True)) == {3: 1.0, 4: 1.0}
    with pytest.raises(AssertionError, match="skipped"):
        state.observe(6, [1])


def test_no_penalty_keeps_no_counts():
    assert PenaltyState.of(RowStart(0, 0, SamplingParams(), 0, [1, 2], 1, [])) is None


def test_an_empty_output_has_nothing_to_penalise():
    state = make_state([1, 2], 2, presence_penalty=2.0)
    logits = torch.randn(1, VOCAB)
    assert torch.equal(penalised(logits, state, rows=[0]), logits)
