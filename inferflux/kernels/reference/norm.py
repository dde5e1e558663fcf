"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), alone and after a residual addition."""

import torch

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.NormOp`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    mean_square = values.square().mean(dim=-1, keepdim=True)
    return (values / torch.sqrt(mean_square + eps) * weight.to(wide)).to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.AddNormOp`. The sum is rounded to the residual's type before it is normed."""
    total = residual + x
    return norm(total, weight, eps), total
