"""Matrix product with a weight kept in few bits: widened in registers, multiplied by the tensor cores.

The op is this module: `pack` and `run`. Each weight is read once per block of rows of x, in its few bits: with few rows
the time is that of reading them. int8 and fp8 have one scale per output, applied at the end; int4's groups are scaled
before they are multiplied. A byte of int4 holds an even and an odd column, so x is read in even and odd columns too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from inferflux.kernels.quantized_weight import INT4_GROUP, QuantizedWeight
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.codes import codes_of, widened
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.triton.start import begin

Tensor = torch.Tensor


class PackedWeight(NamedTuple):
    weight: QuantizedWeight
    bias: Tensor | None


@triton.jit
def widen_nibbles(pair, scale, dtype: tl.constexpr):
    """Returns the weights of the even and of the odd columns that bytes of int4 hold, in the type of x."""
    low = (((pair & 0xF) - 8).to(tl.float32) * scale).to(dtype)
    high = (((pair >> 4) - 8).to(tl.float32) * scale).to(dtype)
    return low, high


@triton.jit
def _store(output, accumulator, bias, rows, outputs, num_rows, NUM_OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        accumulator += tl.load(bias + outputs, mask=outputs < NUM_OUTPUTS, other=0.0).to(tl.float32)[None, :]
    mask = (rows < num_rows)[:, None] & (outputs < NUM_OUTPUTS)[None, :]
    target = output + rows.to(tl.int64)[:, None] * NUM_OUTPUTS + outputs[None, :]
    tl.store(target, accumulator.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _byte_kernel(
    output,
    x,
    values,  # int8 or fp8 [out, in], see `codes.codes_of`
    scales,  # float32 [out]
    bias,
    num_rows,
    stride_x,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of outputs, block of rows)."""
    begin(EARLY)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x + rows.to(tl.int64)[:, None] * stride_x
    weight_rows = values + outputs.to(tl.int64)[:, None] * NUM_INPUTS
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, NUM_INPUTS, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        inside = (inputs < NUM_INPUTS)[None, :]
        tile = tl.load(x_rows + inputs[None, :], mask=(rows < num_rows)[:, None] & inside, other=0.0)
        weight = tl.load(weight_rows + inputs[None, :], mask=(outputs < NUM_OUTPUTS)[:, None] & inside, other=0.0)
        accumulator += tl.dot(tile, tl.trans(widened(weight, tile.dtype)), input_precision=PRECISION)
    accumulator *= tl.load(scales + outputs, mask=outputs < NUM_OUTPUTS, other=0.0)[None, :]
    _store(output, accumulator, bias, rows, outputs, num_rows, NUM_OUTPUTS, HAS_BIAS)


@triton.jit(do_not_specialize=["num_rows"])
def _nibble_kernel(
    output,
    x,
    values,  # uint8 [out, NUM_GROUPS * GROUP / 2]
    scales,  # float32 [out, NUM_GROUPS]
    bias,
    num_rows,
    stride_x,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of outputs, block of rows). BLOCK_K columns are BLOCK_K / 2 bytes."""
    begin(EARLY)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x + rows.to(tl.int64)[:, None] * stride_x
    num_bytes: tl.constexpr = NUM_GROUPS * GROUP // 2
    weight_rows = values + outputs.to(tl.int64)[:, None] * num_bytes
    scale_rows = scales + outputs.to(tl.int64)[:, None] * NUM_GROUPS
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_bytes, BLOCK_K // 2):
        places = start + tl.arange(0, BLOCK_K // 2)
        in_row = (rows < num_rows)[:, None]
        even = tl.load(x_rows + 2 * places[None, :], mask=in_row & (2 * places < NUM_INPUTS)[None, :], other=0.0)
        odd = tl.load(x_rows + 2 * places[None, :] + 1, mask=in_row & (2 * places + 1 < NUM_INPUTS)[None, :], other=0.0)
        inside = (outputs < NUM_OUTPUTS)[:, None] & (places < num_bytes)[None, :]
        pair = tl.load(weight_rows + places[None, :], mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_rows + (places // (GROUP // 2))[None, :], mask=inside, other=0.0)
        low, high = widen_nibbles(pair, scale, even.dtype)
        accumulator += tl.dot(even, tl.trans(low), input_precision=PRECISION)
        accumulator += tl.dot(odd, tl.trans(high), input_precision=PRECISION)
    _store(output, accumulator, bias, rows, outputs, num_rows, NUM_OUTPUTS, HAS_BIAS)


def pack(weight: QuantizedWeight, bias: Tensor | None) -> PackedWeight:
    """See `ops.QuantizedLinearOp.pack`."""
    return PackedWeight(weight, bias)


def run(packed: PackedWeight, x: Tensor, sizes: Sizes | None = None) -> Tensor:
    """See `ops.QuantizedLinearOp.run`. sizes: others than this GPU's."""
    weight, bias = packed
    if x.stride(-1) != 1:
        x = x.contiguous()
    num_rows, num_outputs = x.shape[0], weight.num_outputs
    output = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if not num_rows:
        return output
    sizes = sizes or tuning.sizes_for(x.device, x.dtype)
    tile = tuning.product_tile(sizes.products[weight.scheme], num_rows, x.dtype)
    grid = (triton.cdiv(num_outputs, tile.block_n), triton.cdiv(num_rows, tile.block_m))
    shape = {"NUM_OUTPUTS": num_outputs, "NUM_INPUTS": weight.num_inputs}
    kernel = _byte_kernel
    if weight.scheme == "int4":
        kernel = _nibble_kernel
        shape |= {"NUM_GROUPS": weight.scales.shape[1], "GROUP": INT4_GROUP}
    kernel[grid](
        output, x, codes_of(weight.values), weight.scales, weight.scales if bias is None else bias,
        num_rows, x.stride(0),
        **shape, HAS_BIAS=bias is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.num_warps, num_stages=tile.num_stages,
        **tuning.start_of(sizes, x.device),
    )  # fmt: skip
    return output
