"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): the tables of cosines and sines and their scalings.

Knows angles and positions; the rotation itself is the `rope` op.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from inferflux.engine.layers.rope_spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    Scaling,
    YarnScaling,
)
from inferflux.engine.transfer import Array, bits_of

Tensor = torch.Tensor
Angles = tuple[Tensor, Tensor]
BLOCK_POSITIONS = 4096


class RopeTable:
    """Cosines and sines of every position of one rope, R dims each; kept once per pair of dims, so half of R.

    Computed in float32 and kept in the type the model computes in.
    """

    def __init__(self, rope: RopeSpec, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, magnitude = inverse_frequencies(rope)
        # [positions, 2, R / 2]: one gather fetches both
        self._table = torch.empty((max_positions, 2, len(frequencies)), dtype=dtype, device=device)
        for first in range(0, max_positions, BLOCK_POSITIONS):
            block = self._table[first : first + BLOCK_POSITIONS]
            angles = torch.outer(torch.arange(first, first + len(block), dtype=torch.float32), frequencies)
            block[:, 0].copy_(angles.cos() * magnitude)
            block[:, 1].copy_(angles.sin() * magnitude)

    def gather(self, positions: Tensor) -> Angles:
        """positions int64 [T]. Returns cos and sin, [T, R] each, as the `rope` op wants them."""
        halves = self._table.index_select(0, positions)
        cos, sin = torch.cat((halves, halves), dim=-1).unbind(1)
        return cos, sin

    def writer(self, angles: Tensor) -> Callable[[Array], None]:
        """Returns what writes cos and sin of positions, int64 [T], into `angles` [T, 2, R], on a CPU: what `gather`
        returns, with less of torch."""
        table, size = bits_of(self._table), self._table.shape[2]
        first, second = (bits_of(half) for half in angles.split(size, dim=2))

        def write(positions: Array) -> None:
            first[:] = second[:] = table.take(positions, axis=0)

        return write


def inverse_frequencies(rope: RopeSpec) -> tuple[Tensor, float]:
    """Returns the angle per position of each pair of dims, float32 [R / 2], and what multiplies cos and sin."""
    dims = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    periods = rope.theta**dims
    if rope.scaling is None:
        return 1.0 / periods, 1.0
    return _SCALE[type(rope.scaling)](rope.scaling, rope, periods)


def _linear(scaling: LinearScaling, rope: RopeSpec, periods: Tensor) -> tuple[Tensor, float]:
    return 1.0 / periods / scaling.factor, 1.0


def _llama3(scaling: Llama3Scaling, rope: RopeSpec, periods: Tensor) -> tuple[Tensor, float]:
    """Blends kept and divided frequencies by how often they turn within the original length."""
    frequencies = 1.0 / periods
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept), 1.0


def _yarn(scaling: YarnScaling, rope: RopeSpec, periods: Tensor) -> tuple[Tensor, float]:
    """Section 3.2 of the paper ("NTK-by-parts"): a ramp over dims from kept to divided frequencies."""

    def dim_of(turns: float) -> float:
        log = math.log(scaling.original_max_positions / (turns * 2 * math.pi))
        return rope.rotary_dim * log / (2 * math.log(rope.theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = high - low if high != low else 0.001
    divided = ((torch.arange(len(periods), dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    frequencies = 1.0 / periods
    return frequencies / scaling.factor * divided + frequencies * (1.0 - divided), scaling.attention_factor


def _longrope(scaling: LongRopeScaling, rope: RopeSpec, periods: Tensor) -> tuple[Tensor, float]:
    factors = scaling.long_factors if scaling.long else scaling.short_factors
    return 1.0 / (torch.tensor(factors) * periods), scaling.attention_factor


_SCALE: dict[type[Scaling], Callable[[Any, RopeSpec, Tensor], tuple[Tensor, float]]] = {
    LinearScaling: _linear,
    Llama3Scaling: _llama3,
    YarnScaling: _yarn,
    LongRopeScaling: _longrope,
}
