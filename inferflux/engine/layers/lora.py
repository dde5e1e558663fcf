"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): what one adds to a matrix's product, unmerged, and which
of a step's tokens it is added to. Knows no file and no request."""

from typing import NamedTuple

import torch
from torch.nn import functional

Tensor = torch.Tensor


class AdapterGroup(NamedTuple):
    """Which of a step's T tokens are computed with an adapter. adapter: its number, from 1. tokens int64 [N]: their
    places; None: all T."""

    adapter: int
    tokens: Tensor | None


class StepAdapters(NamedTuple):
    """Of a step with adapters, which most are not. numbers int32 [T]: the adapter that computes each token; 0: none.
    groups: the same by adapter, each once."""

    numbers: Tensor
    groups: tuple[AdapterGroup, ...]


class LoraWeights(NamedTuple):
    """x @ down.T @ up.T: down [r, in], up [out, r], scaled already. For several matrices stacked to one, r is their
    sum, and `up` has zeros where the ranks of one meet the outputs of another."""

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.down), self.up)
