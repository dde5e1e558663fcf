"""Gated activations: gate, curve and product in one pass."""

import torch

from inferflux.kernels.native.calls import GATE, TYPES, call
from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.torch import activation as fallback

Tensor = torch.Tensor
_KINDS = {"silu": 0, "gelu_tanh": 1}


def activation(gate_up: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.ActivationOp`."""
    number = _KINDS.get(kind)
    if number is None or not gate_up.is_contiguous():
        return fallback.activation(gate_up, kind)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, size))
    call(GATE, TYPES[gate_up.dtype], (out, gate_up), rows, size, number)
    return out
