"""Gated activations: SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202, equations 5 and 6)."""

import math

import torch

from inferflux.kernels.ops import ActivationKind

Tensor = torch.Tensor


def activation(gate_up: Tensor, kind: ActivationKind) -> Tensor:
    """See `ops.ActivationOp`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (_gate(gate, kind) * up).to(gate_up.dtype)


def _gate(x: Tensor, kind: ActivationKind) -> Tensor:
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
