"""RMSNorm and the fused residual add + RMSNorm: one program per row, the row held in registers.

Strides are sizes of the model: the compiler is told that they are multiples of 16, else it reads two bytes at a time.
All that a program reads it asks for before it waits for the first: a decode step's row is one trip to memory and back.

RMSNorm after Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.triton.start import begin


@triton.jit
def _norm_kernel(
    output,
    x,
    weight,
    stride_row,
    stride_head,
    eps,
    WEIGHT_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program i: row i // HEADS, head i % HEADS of x [rows, HEADS, SIZE]."""
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    begin(EARLY)
    gain = tl.load(weight + head % WEIGHT_HEADS * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x + program // HEADS * stride_row + head * stride_head + columns, mask=mask, other=0.0)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    tl.store(output + program * SIZE + columns, (values * scale * gain).to(output.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_kernel(
    output,
    total,
    x,
    residual,
    weight,
    stride_x,
    stride_residual,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program i: row i. The sum is rounded to the residual's type before it is normed, as two separate ops would."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    begin(EARLY)
    added = tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    added += tl.load(residual + row * stride_residual + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row * SIZE + columns, rounded, mask=mask)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    tl.store(output + row * SIZE + columns, (values * scale * gain).to(output.dtype.element_ty), mask=mask)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, sizes: Sizes | None = None) -> torch.Tensor:
    """See `ops.NormOp`. x [rows, F] or [rows, heads, F]; other ranks are flattened to rows. sizes: others than this
    GPU's."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    shape = x.shape
    view = x.reshape(-1, *shape[-2:]) if x.dim() > 2 else x.reshape(-1, 1, shape[-1])
    output = torch.empty(shape, dtype=x.dtype, device=x.device)
    rows, heads, size = view.shape
    block = triton.next_power_of_2(size)
    sizes = sizes or tuning.sizes_for(x.device, x.dtype)
    _norm_kernel[(rows * heads,)](
        output, view, weight.contiguous(), view.stride(0), view.stride(1), eps,
        WEIGHT_HEADS=weight.numel() // size, HEADS=heads, SIZE=size, BLOCK=block,
        num_warps=_num_warps(block, sizes), **tuning.start_of(sizes, x.device),
    )  # fmt: skip
    return output


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, sizes: Sizes | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.AddNormOp`. x, residual [rows, F]. sizes: others than this GPU's."""
    size = x.shape[-1]
    x, residual = x.reshape(-1, size), residual.reshape(-1, size)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    sizes = sizes or tuning.sizes_for(x.device, x.dtype)
    _add_norm_kernel[(x.shape[0],)](
        output, total, x, residual, weight, x.stride(0), residual.stride(0), eps,
        SIZE=size, BLOCK=block, num_warps=_num_warps(block, sizes), **tuning.start_of(sizes, x.device),
    )  # fmt: skip
    return output, total


def _num_warps(block: int, sizes: Sizes) -> int:
    share = sizes.blocks["norm"]
    return min(max(block // share.size, 1), share.num_warps)
