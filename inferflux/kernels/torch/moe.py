"""Mixture of experts: tokens sorted by expert, then two products per expert that has any. The op is this module.

Each expert's matrices lie as `linear` likes them. How many tokens an expert has is asked of the device once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.torch import linear
from inferflux.kernels.torch.activation import activation

Tensor = torch.Tensor
Experts = list[tuple[linear.PackedWeight, linear.PackedWeight]]


def pack(gate_up: Iterable[Tensor], down: Iterable[Tensor]) -> Experts:
    """See `ops.MoeOp.pack`."""
    return [(linear.pack(one, None), linear.pack(other, None)) for one, other in zip(gate_up, down, strict=True)]


def run(experts: Experts, x: Tensor, expert_ids: Tensor, weights: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.MoeOp.run`."""
    return run_experts(experts, linear.run, (x, expert_ids, weights), kind)


def run_experts(
    experts: Sequence[tuple[Any, Any]],
    multiply: Callable[[Any, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    kind: ActivationKind,
) -> Tensor:
    """experts: both matrices of each, as `multiply(matrix, x)` wants them. inputs: as `ops.MoeOp.run` gets them."""
    x, expert_ids, weights = inputs
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    tokens = order // expert_ids.shape[1]
    scales = weights.flatten().index_select(0, order).unsqueeze(1)
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    first = 0
    for (gate_up, down), count in zip(experts, flat.bincount(minlength=len(experts)).tolist(), strict=False):
        if count:
            mine = tokens[first : first + count]
            inner = activation(multiply(gate_up, x.index_select(0, mine)), kind)
            y.index_add_(0, mine, multiply(down, inner).to(y.dtype).mul_(scales[first : first + count]))
            first += count
    return y.to(x.dtype)
