"""The sampler against transformers' filters, torch's log_softmax and its own promises about seeds."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inferflux.engine.sampling.sampler import Draw, Sampler
from inferflux.engine.sampling.state import SamplerTable
from inferflux.engine.step import RowStart
from inferflux.kernels.kernel_set import select
from inferflux.sampling_params import SamplingParams

KERNEL = select(torch.device("cpu"), torch.float32).sampling
VOCAB = 12


class Rows:
    """A sampler whose slots hold the requests added so far; slot i is row i unless said otherwise."""

    def __init__(self, num_slots: int = 8, vocab_size: int = VOCAB) -> None:
        self.table = SamplerTable(num_slots, vocab_size)
        self.sampler = Sampler(KERNEL, self.table)

    def add(self, slot: int, *, history: tuple[int, ...] = (1,), eos: tuple[int, ...] = (), **params: Any) -> None:
        sampling = SamplingParams(**params)
        self.table.set(RowStart(slot, slot, sampling, sampling.seed or 0, list(history), len(history), list(eos)))

    def draw(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> Draw:
        asked = self.table.asked(np.array(slots))
        return self.sampler.draw(logits.clone(), np.array(slots), np.array(positions), asked)

    def tokens(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> list[int]:
        return self.draw(logits, slots, positions).token_ids.tolist()


LOGITS = torch.tensor([0.3, 1.9, -0.2, 1.1, 0.6, 1.6, -0.4, 0.9, 1.2, 0.1, -0.1, 0.5])


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.55},
        {"min_p": 0.4},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.3},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_k": 1000},
    ],
)
def test_draws_follow_the_distribution_that_transformers_filters_leave(params: dict[str, Any]):
    num_draws = 4000
    filters = LogitsProcessorList([TemperatureLogitsWarper(params.get("temperature", 1.0))])
    if "top_k" in params:
        filters.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        filters.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        filters.append(MinPLogitsWarper(params["min_p"]))
    expected = torch.softmax(filters(None, LOGITS[None].clone()), dim=1)[0]
    rows = Rows()
    rows.add(0, seed=11, **params)
    drawn = rows.tokens(LOGITS.repeat(num_draws, 1), [0] * num_draws, list(range(num_draws)))
    shares = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / num_draws
    assert torch.equal(shares > 0, expected > 0)
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_a_seeded_draw_does_not_depend_on_the_batch():
    logits = torch.randn(6, VOCAB)
    settings: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "temperature": 0.7, "top_k": 5},
        {"temperature": 0.0},
        {"seed": -5, "top_p": 0.8, "frequency_penalty": 0.5, "logprobs": 2},
        {"seed": 1, "min_p": 0.05, "logit_bias": {3: 2.0}},
        {"seed": 2**63 - 1},
    ]
    positions = [4, 9, 2, 17, 4, 1000]
    together, alone = Rows(), []
    for slot, params in enumerate(settings):
        together.add(slot, **params)
        single = Rows()
        single.add(3, **params)
        alone += single.tokens(logits[slot : slot + 1], [3], [positions[slot]])
    order = [5, 3, 1, 0, 4, 2]
    drawn = together.tokens(logits[order], order, [positions[slot] for slot in order])
    assert [drawn[order.index(slot)] for slot in range(6)] == alone


def test_seed_and_position_both_matter():
    flat = torch.zeros(64, 1000)
    rows = Rows(2, 1000)
    rows.add(0, seed=7)
    rows.add(1, seed=-7)
    first = rows.tokens(flat, [0] * 64, list(range(64)))
    assert first == rows.tokens(flat, [0] * 64, list(range(64)))
    assert first != rows.tokens(flat, [1] * 64, list(range(64)))
    assert len(set(first)) > 50


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1e-7}, {"temperature": 0.0, "logprobs": 0}])
def test_greedy_takes_the_lowest_id_among_equals(params: dict[str, Any]):
    rows = Rows()
    rows.add(0, **params)
    assert rows.tokens(torch.tensor([[0.0, 5.0, 5.0, 1.0] + [0.0] * 8]), [0], [3]) == [1]


def test_a_greedy_row_draws_the_same_beside_a_random_one():
    rows = Rows()
    rows.add(0, temperature=0.0)
    rows.add(1, seed=3)
    assert rows.tokens(LOGITS.repeat(2, 1), [0, 1], [5, 5])[0] == int(LOGITS.argmax())


def test_min_tokens_holds_back_every_end_until_enough_are_out():
    rows = Rows()
    rows.add(0, history=(4, 4), eos=(1,), temperature=0.0, min_tokens=2, stop_token_ids=(5, 99999))
    assert rows.tokens(LOGITS[None], [0], [2]) == [8]
    assert rows.tokens(LOGITS[None], [0], [3]) == [8]
    assert rows.tokens(LOGITS[None], [0], [4]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-4])
def test_holding_back_the_whole_vocabulary_still_yields_a_token(temperature: float):
    rows = Rows()
    rows.add(0, eos=tuple(range(VOCAB)), temperature=temperature, min_tokens=3, seed=1)
    draw = rows.draw(LOGITS[None], [0], [1])
    assert 0 <= int(draw.token_ids[0]) < VOCAB


def test_logit_bias_adds_and_ignores_foreign_ids():
    rows = Rows()
    rows.add(0, temperature=0.0, logit_bias={2: 100.0, 5: -100, 4_000_000: 3.0})
    rows.add(1, temperature=0.0)
    assert rows.tokens(LOGITS.repeat(2, 1), [0, 1], [1, 1]) == [2, 1]


def test_a_slot_forgets_who_held_it_before():
    rows = Rows()
    rows.add(0, temperature=0.5, seed=1, logit_bias={2: 100.0}, repetition_penalty=5.0, min_tokens=9, eos=(1,))
    rows.add(0, temperature=0.0)
    draw = rows.draw(LOGITS[None], [0], [1])
    assert draw.token_ids.tolist() == [1]
    assert draw.scores is None


def test_logprobs_are_of_the_raw_distribution():
    logits = torch.randn(3, VOCAB)
    rows = Rows()
    rows.add(0, temperature=0.0, logprobs=3, logit_bias={4: 50.0}, repetition_penalty=2.0)
    rows.add(1, temperature=0.0)
    rows.add(2, temperature=1.3, seed=5, logprobs=0)
    draw = rows.draw(logits, [0, 1, 2], [1, 1, 1])
    assert draw.scored == [0, 2]
    assert draw.scores is not None
    expected = torch.log_softmax(logits, dim=1)[[0, 2]]
    chosen = draw.token_ids[[0, 2]]
    assert int(chosen[0]) == 4
    assert torch.equal(draw.scores.token_ids, chosen)
    assert torch.equal(draw.scores.logprobs, expected.gather(1, chosen[:, None])[:, 0])
    assert draw.scores.ranks.tolist() == [
        1 + int((row > row[token]).sum()) for row, token in zip(expected, chosen, strict=True)
    ]
    assert torch.equal(draw.scores.top_logprobs, expected.topk(3).values)
    assert torch.equal(expected.gather(1, draw.scores.top_ids), draw.scores.top_logprobs)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 4}, {"seed": 4, "top_p": 0.9, "logprobs": 2}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_leaves_the_others_alone(params: dict[str, Any], poison: float):
    logits = torch.randn(3, VOCAB)
    rows = Rows()
    for slot in range(3):
        rows.add(slot, **params)
    healthy = rows.tokens(logits, [0, 1, 2], [6, 7, 8])
    logits[1, 4] = poison
    draw = rows.draw(logits, [0, 1, 2], [6, 7, 8])
    assert torch.isfinite(draw.peaks).tolist() == [True, False, True]
    assert draw.token_ids[[0, 2]].tolist() == [healthy[0], healthy[2]]


def test_only_minus_infinity_somewhere_is_no_defect():
    logits = LOGITS.clone()
    logits[1] = -torch.inf
    rows = Rows()
    rows.add(0, temperature=0.0)
    draw = rows.draw(logits[None], [0], [1])
    assert draw.token_ids.tolist() == [5]
    assert torch.isfinite(draw.peaks).all()
