"""RMSNorm, alone and after a residual addition, in one pass over each row."""

import torch

from inferflux.kernels.native.calls import NORM, TYPES, call, expect_same
from inferflux.kernels.torch import norm as fallback

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.NormOp`."""
    per_token = x.dim() == weight.dim() + 1
    # What belongs to one token must lie together, and tokens at one distance.
    is_plain = x[0].is_contiguous() if per_token and len(x) else x.is_contiguous()
    if not is_plain or not _fits(x, weight):
        return fallback.norm(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    _run(out, x, None, weight, x.stride(0) if per_token else weight.numel(), eps)
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.AddNormOp`. Adds into `residual`."""
    if not (x.is_contiguous() and residual.is_contiguous() and x.dtype == residual.dtype and _fits(x, weight)):
        return fallback.add_norm(x, residual, weight, eps)
    expect_same("shape of what is added", x.shape, residual.shape)
    out = torch.empty_like(x)
    _run(out, x, residual, weight, weight.numel(), eps)
    return out, residual


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and weight.is_contiguous() and x.shape[-weight.dim() :] == weight.shape


def _run(out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, token_stride: int, eps: float) -> None:
    size = weight.shape[-1]
    heads = weight.numel() // size
    numbers = (x.numel() // size, heads, size, token_stride, eps)
    call(NORM, TYPES[x.dtype], (out, x, residual, weight), *numbers)
