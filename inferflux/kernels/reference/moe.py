"""Mixture of experts, one expert after another. The op is this module: `pack` and `run`."""

from collections.abc import Iterable

import torch

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.reference.activation import activation

Tensor = torch.Tensor
Experts = list[tuple[Tensor, Tensor]]


def pack(gate_up: Iterable[Tensor], down: Iterable[Tensor]) -> Experts:
    """See `ops.MoeOp.pack`."""
    return list(zip(gate_up, down, strict=True))


def run(experts: Experts, x: Tensor, expert_ids: Tensor, weights: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.MoeOp.run`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(x, dtype=wide)
    for expert, (gate_up, down) in enumerate(experts):
        tokens, places = torch.where(expert_ids == expert)
        inner = activation(x[tokens].to(wide) @ gate_up.to(wide).T, kind)
        y.index_add_(0, tokens, inner @ down.to(wide).T * weights[tokens, places].to(wide).unsqueeze(1))
    return y.to(x.dtype)
