"""Matrix product whose weights lie as the device likes them best. The op is this module: `pack` and `run`.

On a CPU there are three layouts: repacked by oneDNN in blocks; as they came; and, for 16-bit types that the CPU cannot
multiply, as they came but widened to float32 one cache-sized block at a time, so that memory holds 16 bits per weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from inferflux.kernels import cpu_features

Tensor = torch.Tensor

# A oneDNN primitive costs about 20 us before it computes: [64, 64] x 1 row takes 23 us packed and 3 us plain,
# [256, 256] 28 and 8, [576, 576] 48 and 42, [576, 576] x 4 rows 62 and 89. 2 cores of a Zen 3 EPYC, torch 2.13.
MIN_PACKED_ELEMENTS = 2**18

# The batch oneDNN is told to lay weights out for. Float32 [9728, 896], GB/s of weights at 1, 4, 16, 128, 512 rows:
# plain 14, 4.8, 3.9, 1.0, 0.44; hint 1: 19, 10, 6.8, 1.7, 0.55; hint 64: 20, 13, 8.4, 2.0, 0.53. Hints from 16 to 512
# lay out alike. Same machine.
PACK_BATCH_HINT = 64

# Float32 bytes of a widened block. bfloat16 [9728, 896], GB/s of weights at 4, 16, 256 rows: 256 KiB 1.8, 1.2, 0.31;
# 1 MiB 3.0, 2.4, 0.43; 4 MiB 4.4, 3.2, 0.40. Same machine: 512 KiB L2 per core, 32 MiB L3.
BLOCK_BYTES = 4 * 2**20

# Up to this many rows a matrix-vector product each beats blocks (GB/s: 1 row 16 to 7, 2 rows 8 to 5, 4 rows 4 to 4.4).
MAX_VECTOR_ROWS = 2


class PackedWeight(NamedTuple):
    """multiply(x, weight, bias) computes; weight is in the layout it wants."""

    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weight: Tensor
    bias: Tensor | None


def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.LinearOp.pack`."""
    if weight.device.type == "cpu":
        if not cpu_features.is_fast(weight.dtype):
            return PackedWeight(_multiply_widened, weight.contiguous(), bias)
        if weight.numel() >= MIN_PACKED_ELEMENTS and weight.dtype != torch.float64 and cpu_features.has_onednn():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_BATCH_HINT)
            return PackedWeight(_multiply_packed, packed, bias)
    return PackedWeight(functional.linear, weight, bias)


def run(packed: PackedWeight, x: Tensor) -> Tensor:
    """See `ops.LinearOp.run`."""
    multiply, weight, bias = packed
    return multiply(x, weight, bias)


def _multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _multiply_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_rows = x.shape[0]
    if num_rows == 1:
        return functional.linear(x, weight, bias)
    if num_rows <= MAX_VECTOR_ROWS:
        return torch.cat([functional.linear(row, weight, bias) for row in x.split(1)])
    num_outputs, num_inputs = weight.shape
    block_rows = max(1, min(num_outputs, BLOCK_BYTES // (4 * num_inputs)))
    block = torch.empty((block_rows, num_inputs), dtype=torch.float32)
    columns = x.float().t()
    y = torch.empty((num_outputs, num_rows), dtype=torch.float32)
    for first in range(0, num_outputs, block_rows):
        part = weight[first : first + block_rows]
        torch.mm(block[: len(part)].copy_(part), columns, out=y[first : first + block_rows])
    if bias is not None:
        y.add_(bias.unsqueeze(1))
    return torch.empty((num_rows, num_outputs), dtype=x.dtype).copy_(y.t())
