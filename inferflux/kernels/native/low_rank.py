"""LoRA: adds the low-rank products of many rows at once, each row's by its own adapter."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch.nn import functional

from inferflux.kernels.native import DTYPES
from inferflux.kernels.native.calls import LOW_RANK, TYPES, call, expect_same
from inferflux.kernels.native.loading import library

Tensor = torch.Tensor
# As in low_rank.h.
WIDE: Final = 64


class LowRanks(NamedTuple):
    """pairs int64 [adapters + 1, 3]: by an adapter's number, the addresses of its two matrices and its rank. weights:
    the matrices. most: the largest rank."""

    pairs: Tensor
    weights: tuple[Tensor, ...]
    num_outputs: int
    num_inputs: int
    most: int


def computes(weight: Tensor) -> bool:
    """Whether the library supports the weight's type and device."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and library().reason is None


def arrange(low_ranks: Mapping[int, tuple[Tensor, Tensor]]) -> LowRanks:
    """low_ranks: by the adapter's number, from 1, down [r, in] and up [out, r], scaled already. Copies `up`."""
    pairs = torch.zeros((max(low_ranks) + 1, 3), dtype=torch.int64)
    weights: list[Tensor] = []
    for number, (down, up) in low_ranks.items():
        num_outputs, rank = up.shape
        panels = functional.pad(up, (0, 0, 0, -num_outputs % WIDE)).view(-1, WIDE, rank).transpose(1, 2)
        weights += (down.contiguous(), panels.contiguous())
        pairs[number] = torch.tensor([weights[-2].data_ptr(), weights[-1].data_ptr(), rank])
    return LowRanks(pairs, tuple(weights), num_outputs, down.shape[1], int(pairs[:, 2].max()))


def add(low_ranks: LowRanks, y: Tensor, x: Tensor, adapters: Tensor) -> None:
    """y [T, out] += what the adapter of each row adds to its x [T, in]. adapters int32 [T]: by number, 0: none."""
    pairs, weights, num_outputs, num_inputs, most = low_ranks
    expect_same("shape of what is added to", y.shape, (len(x), num_outputs))
    expect_same("columns of x", x.shape[1], num_inputs)
    expect_same("rows with adapters", adapters.shape[0], len(x))
    expect_same("types", {y.dtype, x.dtype, adapters.dtype}, {weights[0].dtype, torch.int32})
    expect_same("layout", y.is_contiguous() and adapters.is_contiguous(), True)
    numbers = (len(pairs), len(x), num_outputs, num_inputs, most)
    call(LOW_RANK, TYPES[x.dtype], (y, x.contiguous(), adapters, pairs), *numbers)
