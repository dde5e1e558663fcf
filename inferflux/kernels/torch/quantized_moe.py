"""Mixture of quantised experts: as `moe`, each matrix multiplied as `quantized_linear` does it. The op is this module.

Between the products numbers stay in float32, in which those are computed anyway.
"""

from collections.abc import Iterable

import torch

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.quantized_weight import QuantizedWeight
from inferflux.kernels.torch import quantized_linear
from inferflux.kernels.torch.moe import run_experts

Tensor = torch.Tensor
Experts = list[tuple[quantized_linear.PackedWeight, quantized_linear.PackedWeight]]

# As the products do: see ops.QuantizedLinearOp.
rounds_inputs = quantized_linear.rounds_inputs


def pack(gate_up: Iterable[QuantizedWeight], down: Iterable[QuantizedWeight]) -> Experts:
    """See `ops.QuantizedMoeOp.pack`."""
    arrange = quantized_linear.pack
    return [(arrange(one, None), arrange(other, None)) for one, other in zip(gate_up, down, strict=True)]


def run(experts: Experts, x: Tensor, expert_ids: Tensor, weights: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.QuantizedMoeOp.run`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return run_experts(experts, quantized_linear.run, (wide, expert_ids, weights), kind).to(x.dtype)
