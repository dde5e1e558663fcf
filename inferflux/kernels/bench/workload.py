"""Workload: one op at one size, and the least it must move and compute there. Knows no backend and no clock."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from inferflux.kernels.cases.case import Inputs

# Makes one call's arguments in a dtype on a device.
Build = Callable[[torch.dtype, torch.device], Inputs]


class Cost(NamedTuple):
    """What any implementation must do: numbers read or written once each, and multiplications and additions.

    elements: in the dtype of the run. fixed_bytes: in types of their own (float32 logits, page tables).
    """

    elements: int
    flops: int
    fixed_bytes: int = 0

    def num_bytes(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """streams: what it reads lies in memory when a model calls it (weights, pages), so caches are emptied before."""

    op: str
    name: str
    cost: Cost
    streams: bool
    build: Build = field(repr=False)
