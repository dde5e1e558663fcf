"""RMSNorm, alone and after a residual addition, in one pass over each row."""

import torch

from inferflux.kernels.native.loading import TYPES, library
from inferflux.kernels.torch import norm as fallback

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.NormOp`."""
    if weight.dim() != 1 or not x.is_contiguous() or x.dtype != weight.dtype:
        return fallback.norm(x, weight, eps)
    out = torch.empty_like(x)
    _run(out, x, None, weight, eps)
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.AddNormOp`. Adds into `residual`."""
    if not (x.is_contiguous() and residual.is_contiguous() and x.dtype == residual.dtype == weight.dtype):
        return fallback.add_norm(x, residual, weight, eps)
    out = torch.empty_like(x)
    _run(out, x, residual.data_ptr(), weight, eps)
    return out, residual


def _run(out: Tensor, x: Tensor, residual: int | None, weight: Tensor, eps: float) -> None:
    size = weight.shape[0]
    rows = x.numel() // size
    pointers = (out.data_ptr(), x.data_ptr(), residual, weight.data_ptr())
    library().norm(TYPES[x.dtype], *pointers, rows, size, eps, torch.get_num_threads())
