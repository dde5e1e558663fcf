"""Noise: the published test vectors, and what sampling relies on."""

import pytest
import torch

from inferflux.kernels.noise import philox, uniform

ONES = 0xFFFFFFFF

# Known answers of Philox 4x32-10 (Random123, kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    result = philox(torch.tensor(counter).unsqueeze(1), torch.tensor(key).unsqueeze(1))
    assert result[:, 0].tolist() == list(expected)


def test_known_answers_hold_side_by_side() -> None:
    counters, keys, expected = (torch.tensor(column).T for column in zip(*KNOWN_ANSWERS, strict=True))
    assert torch.equal(philox(counters, keys), expected)


def test_a_number_depends_on_its_seed_and_position_alone() -> None:
    seeds = torch.tensor([5, -1, 2**63 - 1, -(2**63), 5, 0])
    positions = torch.tensor([0, 7, 2**40, 1, 1, 2**31])
    together = uniform(seeds, positions)
    alone = torch.cat([uniform(seeds[i : i + 1], positions[i : i + 1]) for i in range(len(seeds))])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == len(seeds)


def test_high_halves_of_seed_and_position_count() -> None:
    numbers = uniform(torch.tensor([1, 1 + 2**32, 1]), torch.tensor([2, 2, 2 + 2**32]))
    assert len(set(numbers.tolist())) == 3


def test_numbers_are_uniform() -> None:
    """Neighbouring seeds and positions, 64 bins: chi-square below its 99.9 % quantile for 63 degrees of freedom."""
    seeds = torch.arange(200).repeat_interleave(200)
    numbers = uniform(seeds, torch.arange(200).repeat(200))
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    expected = len(numbers) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4


def test_numbers_are_the_published_ones_wherever_they_are_computed() -> None:
    """A CPU computes blocks of positions and keeps them: at their borders, and for each seed, as one by one."""
    positions = torch.tensor([62, 63, 64, 65, -1, 0, 2**40 + 63, 2**40 + 64])
    for seed in (0, 3, -7):
        low, high = seed & ONES, (seed >> 32) & ONES
        counters = torch.stack((positions & ONES, (positions >> 32) & ONES, positions * 0, positions * 0))
        random = philox(counters, torch.tensor([[low], [high]]).expand(2, len(positions)))
        expected = [((w1 & 0x1FFFFF) << 32 | w0) / 2**53 for w0, w1 in zip(*random[:2].tolist(), strict=True)]
        assert uniform(torch.full_like(positions, seed), positions).tolist() == expected
