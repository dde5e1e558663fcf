"""Mixture of quantised experts: widened, then computed as `moe`. The op is this module: `pack` and `run`."""

from collections.abc import Iterable

import torch

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.quantized_weight import QuantizedWeight, dequantize
from inferflux.kernels.reference import moe

Tensor = torch.Tensor
Experts = list[tuple[QuantizedWeight, QuantizedWeight]]


def pack(gate_up: Iterable[QuantizedWeight], down: Iterable[QuantizedWeight]) -> Experts:
    """See `ops.QuantizedMoeOp.pack`."""
    return list(zip(gate_up, down, strict=True))


def run(experts: Experts, x: Tensor, expert_ids: Tensor, weights: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.QuantizedMoeOp.run`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    widened = [(dequantize(gate_up, wide), dequantize(down, wide)) for gate_up, down in experts]
    return moe.run(widened, x, expert_ids, weights, kind)
