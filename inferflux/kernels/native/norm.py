"""RMSNorm, alone and after a residual addition, in one pass over each row."""

import torch

from inferflux.kernels.native.calls import NORM, TYPES, call
from inferflux.kernels.torch import norm as fallback

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.NormOp`."""
    per_token = x.shape[-weight.dim() :]
    # What belongs to one token must lie together, and tokens at one distance.
    is_plain = x[0].is_contiguous() if x.dim() == weight.dim() + 1 and len(x) else x.is_contiguous()
    if not is_plain or x.dtype != weight.dtype or per_token != weight.shape or not weight.is_contiguous():
        return fallback.norm(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    token_stride = x.stride(0) if x.dim() == weight.dim() + 1 else weight.numel()
    _run(out, x, None, weight, token_stride, eps)
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.AddNormOp`. Adds into `residual`."""
    if not (x.is_contiguous() and residual.is_contiguous() and x.dtype == residual.dtype == weight.dtype):
        return fallback.add_norm(x, residual, weight, eps)
    out = torch.empty_like(x)
    _run(out, x, residual, weight, weight.shape[0], eps)
    return out, residual


def _run(out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, token_stride: int, eps: float) -> None:
    size = weight.shape[-1]
    heads = weight.numel() // size
    numbers = (x.numel() // size, heads, size, token_stride, eps, torch.get_num_threads())
    call(NORM, TYPES[x.dtype], (out, x, residual, weight), *numbers)
