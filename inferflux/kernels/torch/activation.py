"""Gated activations: one operator for the gate, one product into its result."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch.nn import functional

from inferflux.kernels.ops import ActivationKind

Tensor = torch.Tensor

GATES: Mapping[ActivationKind, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    }
)


def activation(gate_up: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.ActivationOp`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return GATES[kind](gate).mul_(up)
