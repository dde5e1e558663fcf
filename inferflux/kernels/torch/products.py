"""The ways to multiply by a float matrix on a CPU: layouts and methods among which `cpu_table` chooses.

onednn: repacked by oneDNN in blocks. panels: repacked for the native library, which widens in registers. plain: as it
came, multiplied by torch's linear, or, of 16-bit types that the CPU multiplies slowly or not at all, widened to float32
one cache-sized block at a time. Memory holds each weight once, in its own type.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from inferflux.kernels import cpu_features
from inferflux.kernels.cpu_table import Layout, Method
from inferflux.kernels.native import panels
from inferflux.kernels.native.calls import TYPES
from inferflux.kernels.native.loading import library

Tensor = torch.Tensor

# The batch oneDNN is told to lay weights out for. Float32 [9728, 896], GB/s of weights at 1, 4, 16, 128, 512 rows:
# plain 14, 4.8, 3.9, 1.0, 0.44; hint 1: 19, 10, 6.8, 1.7, 0.55; hint 64: 20, 13, 8.4, 2.0, 0.53. Hints from 16 to 512
# lay out alike. 2 cores of a Zen 3 EPYC, torch 2.13.
PACK_BATCH_HINT = 64

# Float32 bytes of a widened block. bfloat16 [9728, 896], GB/s of weights at 4, 16, 256 rows: 256 KiB 1.8, 1.2, 0.31;
# 1 MiB 3.0, 2.4, 0.43; 4 MiB 4.4, 3.2, 0.40. Same machine: 512 KiB L2 per core, 32 MiB L3.
BLOCK_BYTES = 4 * 2**20

# Up to this many rows a matrix-vector product each beats blocks (GB/s: 1 row 16 to 7, 2 rows 8 to 5, 4 rows 4 to 4.4).
MAX_VECTOR_ROWS = 2


def float_layouts(dtype: torch.dtype) -> tuple[Layout, ...]:
    """Returns the layouts of a matrix of `dtype`, the default first."""
    if dtype == torch.float64:
        return (Layout("plain", _contiguous, (LINEAR,)),)
    native = (PANELS,) if dtype in TYPES and library().reason is None else ()
    if not cpu_features.is_fast(dtype):
        # GFLOP/s of bfloat16 [3072, 576] at 1, 16, 128 rows: panels 23, 72, 67; widened 5, 29, 61. One core of a Zen 3.
        return native or (Layout("plain", _contiguous, (VECTORS, WIDENED)),)
    widened = () if dtype == torch.float32 else (WIDENED,)
    plain = Layout("plain", _contiguous, (LINEAR, *widened))
    onednn = (Layout("onednn", _reorder, (ONEDNN,)),) if cpu_features.has_onednn() else ()
    # By themselves panels are as fast as oneDNN or faster (GFLOP/s of [3072, 576] at 1, 8, 32, 256 rows of float32: 12,
    # 60, 101, 148 to 10, 52, 101, 145 on two cores of a Zen 3 EPYC; of bfloat16 at 1, 8, 32, 512 rows, Zen 5: 48, 379,
    # 907, 984 to 44, 306, 662, 963), and decode steps need no Python for them. Only AMX is faster. A start may have no
    # time to measure all, and one product of oneDNN's keeps the whole step off its tape.
    is_best = platform.machine() == "x86_64" and not (dtype == torch.bfloat16 and cpu_features.multiplies_tiles())
    return (*native, *onednn, plain) if is_best else (*onednn, plain, *native)


def multiply_blocks(
    x: Tensor, bias: Tensor | None, shape: tuple[int, int], widen: Callable[[int, int], Tensor]
) -> Tensor:
    """x @ weight.T + bias; the weight [out, in] of `shape` is made float32 by widen(first, last) block by block."""
    num_outputs, num_inputs = shape
    num_rows = x.shape[0]
    block_rows = max(1, min(num_outputs, BLOCK_BYTES // (4 * num_inputs)))
    columns = x.float().t()
    y = torch.empty((num_outputs, num_rows), dtype=torch.float32)
    for first in range(0, num_outputs, block_rows):
        last = min(first + block_rows, num_outputs)
        torch.mm(widen(first, last), columns, out=y[first:last])
    if bias is not None:
        y.add_(bias.unsqueeze(1))
    return torch.empty((num_rows, num_outputs), dtype=x.dtype).copy_(y.t())


def _contiguous(weight: Tensor) -> Tensor:
    return weight.contiguous()


def _reorder(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_BATCH_HINT)


def _onednn(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _linear(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _vectors(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 1:
        return functional.linear(x, weight, bias)
    return torch.cat([functional.linear(row, weight, bias) for row in x.split(1)])


def _widened(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return multiply_blocks(x, bias, (weight.shape[0], weight.shape[1]), lambda a, b: weight[a:b].float())


ONEDNN = Method("onednn", _onednn)
LINEAR = Method("linear", _linear)
PANELS = Layout("panels", panels.arrange_floats, (Method("panels", panels.multiply, on_tape=True),))
VECTORS = Method("vectors", _vectors, MAX_VECTOR_ROWS)
WIDENED = Method("widened", _widened)
