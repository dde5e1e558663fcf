"""RMSNorm through torch's own operator."""

import torch
from torch.nn import functional

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.NormOp`."""
    # Of six ways to write it (mean of squares, vector_norm, vecdot, baddbmm, layer_norm of [x, -x]) none was faster by
    # more than the noise at [1, 576] (16 us), [32, 576] (25 us) and [512, 576] (130 us) in float32 and bfloat16, and
    # this one rounds least. 2 cores of a Zen 3 EPYC (AVX2), torch 2.13.
    if weight.dim() == 1:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.rms_norm(x, weight.shape[-1:], None, eps).mul_(weight)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.AddNormOp`. Adds into `residual`."""
    residual.add_(x)
    return norm(residual, weight, eps), residual
