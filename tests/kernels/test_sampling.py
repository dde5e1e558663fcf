"""Sampling: the meaning of each filter, ties and borders, and that draws follow the distribution."""

import math
from collections.abc import Sequence

import pytest
import torch

from inferflux.kernels.backends import find_backend
from inferflux.kernels.noise import uniform
from inferflux.kernels.ops import SamplingOp
from inferflux.kernels.torch.sampling import sampling_at_once

# torch has one way for CPUs and one for other devices, which is right on a CPU as well.
OPS: dict[str, SamplingOp] = {
    "reference": find_backend("reference").find("sampling"),
    "torch": find_backend("torch").find("sampling"),
    "torch at once": sampling_at_once,
}


@pytest.fixture(params=OPS.values(), ids=OPS.keys())
def sampling(request: pytest.FixtureRequest) -> SamplingOp:
    op: SamplingOp = request.param
    return op


def draw(
    op: SamplingOp,
    probabilities: Sequence[float],
    number: float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    logits = torch.tensor([probabilities]).log()
    floats = (torch.tensor([value]) for value in (temperature, top_p, min_p))
    temperature_row, top_p_row, min_p_row = floats
    noise = torch.tensor([number], dtype=torch.float64)
    return int(op(logits, temperature_row, torch.tensor([top_k]), top_p_row, min_p_row, noise))


def spell_out(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, number: float) -> int:
    """The op's meaning in plain Python, token by token."""
    if temperature == 0:
        return logits.index(max(logits))
    scores = [logit / temperature for logit in logits]
    kept = list(range(len(scores)))
    if 0 < top_k < len(scores):
        least = sorted(scores, reverse=True)[top_k - 1]
        kept = [token for token in kept if scores[token] >= least]
    weights = {token: math.exp(scores[token] - max(scores)) for token in kept}
    total = sum(weights.values())
    if top_p < 1:
        mass = 0.0
        for weight in sorted(weights.values(), reverse=True):
            mass += weight / total
            if mass >= top_p - 1e-6:
                break
        weights = {token: each for token, each in weights.items() if each >= weight}
    weights = {token: each for token, each in weights.items() if each >= min_p * max(weights.values())}
    target, mass = number * sum(weights.values()), 0.0
    for token, each in weights.items():
        mass += each
        if mass > target:
            return token
    raise AssertionError("unreachable")


def test_equals_the_meaning_spelled_out(sampling: SamplingOp) -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (3, 17, 400):
        logits = torch.randn(64, vocab_size, generator=generator) * 2
        logits[::4] = logits[::4].round()
        numbers = torch.rand(64, generator=generator, dtype=torch.float64)
        temperature = torch.tensor([0.0, 0.5, 1.0, 1.7]).repeat(16)
        top_k = torch.tensor([0, 1, 2, 10, 1000]).repeat(13)[:64]
        top_p = torch.tensor([1.0, 0.3, 0.95]).repeat(22)[:64]
        min_p = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0]).repeat(10)[:64]
        columns = (column.tolist() for column in (logits, temperature, top_k, top_p, min_p, numbers))
        expected = [spell_out(*row) for row in zip(*columns, strict=True)]
        assert sampling(logits, temperature, top_k, top_p, min_p, numbers).tolist() == expected


def test_numbers_split_the_kept_tokens_in_id_order(sampling: SamplingOp) -> None:
    shares = [0.25, 0.5, 0.25]
    assert [draw(sampling, shares, number) for number in (0.0, 0.249, 0.251, 0.749, 0.751, 1 - 2**-53)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_greedy_takes_the_first_of_equals(sampling: SamplingOp) -> None:
    assert draw(sampling, [0.2, 0.4, 0.4], 0.99, temperature=0.0) == 1


def test_ties_at_top_k_are_kept(sampling: SamplingOp) -> None:
    assert draw(sampling, [0.1, 0.25, 0.25, 0.4], 0.999, top_k=1) == 3
    assert draw(sampling, [0.1, 0.25, 0.25, 0.4], 0.0, top_k=2) == 1
    assert draw(sampling, [0.1, 0.25, 0.25, 0.4], 0.4, top_k=2) == 2


@pytest.mark.parametrize(
    ("top_p", "first", "last"),
    [(0.3, 1, 1), (0.5, 1, 1), (0.5001, 1, 3), (0.8, 1, 3), (0.8001, 0, 3), (0.9999, 0, 3)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(
    sampling: SamplingOp, top_p: float, first: int, last: int
) -> None:
    """0.8 is reached by 0.5 + 0.3, whatever float32 makes of the three numbers."""
    shares = [0.1, 0.5, 0.1, 0.3]
    assert draw(sampling, shares, 0.0, top_p=top_p) == first
    assert draw(sampling, shares, 0.9999, top_p=top_p) == last


def test_min_p_is_relative_to_the_likeliest(sampling: SamplingOp) -> None:
    shares = [0.19, 0.4, 0.21, 0.2]
    assert draw(sampling, shares, 0.0, min_p=0.4) == 0
    assert draw(sampling, shares, 0.0, min_p=0.51) == 1
    assert draw(sampling, shares, 0.999, min_p=0.51) == 2
    assert draw(sampling, shares, 0.999, min_p=1.0) == 1


def test_a_row_does_not_depend_on_its_neighbours(sampling: SamplingOp) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 500, generator=generator)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.2, 0.0, 1.0])
    top_k = torch.tensor([0, 50, 0, 0, 3, 0])
    top_p = torch.tensor([1.0, 1.0, 0.9, 1.0, 0.5, 0.2])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0])
    noise = torch.rand(6, generator=generator, dtype=torch.float64)
    columns = (logits, temperature, top_k, top_p, min_p, noise)
    alone = [int(sampling(*(column[i : i + 1].clone() for column in columns))) for i in range(6)]
    assert sampling(*columns).tolist() == alone


@pytest.mark.parametrize("op", ["torch", "torch at once"])
def test_a_row_of_nan_yields_some_token(op: str) -> None:
    """The sampler replaces such rows; until it has, no op may leave the vocabulary or fail."""
    rows = torch.full((2, 8), math.nan)
    tokens = OPS[op](
        rows,
        torch.tensor([1.0, 0.0]),
        torch.tensor([3, 0]),
        torch.tensor([0.5, 1.0]),
        torch.zeros(2),
        torch.rand(2).double(),
    )
    assert tokens.min() >= 0
    assert tokens.max() < 8


def test_draws_follow_the_distribution() -> None:
    """20000 seeded draws of 5 tokens: chi-square below its 99.9 % quantile for 4 degrees of freedom."""
    num_draws, shares = 20000, torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])
    logits = shares.log().expand(num_draws, -1).clone()
    ones = torch.ones(num_draws)
    noise = uniform(torch.arange(num_draws), torch.full((num_draws,), 17))
    tokens = find_backend("torch").find("sampling")(
        logits, ones, torch.zeros(num_draws, dtype=torch.int64), ones, torch.zeros(num_draws), noise
    )
    counts = torch.bincount(tokens, minlength=5)
    assert ((counts - shares * num_draws) ** 2 / (shares * num_draws)).sum() < 18.47
