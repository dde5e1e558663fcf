"""Gated activations: gate, curve and product in one pass."""

import torch

from inferflux.kernels.native.loading import TYPES, library
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
    pointers = (out.data_ptr(), gate_up.data_ptr())
    library().gate(TYPES[gate_up.dtype], *pointers, rows, size, number, torch.get_num_threads())
    return out
