"""Matrix product for a few rows of x, whose time is that of reading the weights. The op is this module: `pack`, `run`.

It serves where `tune` found it faster than the vendor's library on this GPU; all other products are that library's. A
program has a few outputs and reads their weights from end to end. One row is multiplied number by number, several by
the tensor cores, whose smallest tile has eight.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.sizes import MOST_ROWS, Sizes
from inferflux.kernels.triton.start import begin

Tensor = torch.Tensor


class PackedWeight(NamedTuple):
    """weight [out, in], what is in a row together."""

    weight: Tensor
    bias: Tensor | None


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    output,
    x,
    weight,
    bias,
    num_rows,
    stride_x,
    stride_weight,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of outputs, block of rows). ROWS: 1, or those of a tile of the tensor cores."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_row = tl.program_id(1) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    is_output = (outputs < NUM_OUTPUTS) | (NUM_OUTPUTS % BLOCK_N == 0)
    weight_rows = weight + outputs.to(tl.int64)[:, None] * stride_weight
    if HAS_BIAS:
        added = tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)
    if ROWS == 1:
        inputs = tl.arange(0, BLOCK_K)
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        # Weights are read a turn ahead and, where the kernel before is still at work, while it is.
        tile = tl.load(
            weight_rows + inputs[None, :], mask=is_output[:, None] & (inputs < NUM_INPUTS)[None, :], other=0.0
        )
        begin(EARLY)
        for start in range(0, NUM_INPUTS, BLOCK_K):
            row = tl.load(x + first_row * stride_x + start + inputs, mask=start + inputs < NUM_INPUTS, other=0.0)
            following = start + BLOCK_K + inputs
            mask = is_output[:, None] & (following < NUM_INPUTS)[None, :]
            next_tile = tl.load(weight_rows + following[None, :], mask=mask, other=0.0)
            products += tile.to(tl.float32) * row.to(tl.float32)[None, :]
            tile = next_tile
        sums = tl.sum(products, 1)[:, None]
    else:
        begin(EARLY)
        sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for start in range(0, NUM_INPUTS, BLOCK_K):
            inputs = start + tl.arange(0, BLOCK_K)
            inside = (inputs < NUM_INPUTS) | (NUM_INPUTS % BLOCK_K == 0)
            tile = tl.load(weight_rows + inputs[None, :], mask=is_output[:, None] & inside[None, :], other=0.0)
            mask = (rows < num_rows)[None, :] & inside[:, None]
            columns = tl.load(x + rows[None, :] * stride_x + inputs[:, None], mask=mask, other=0.0)
            sums += tl.dot(tile, columns, input_precision=PRECISION)
    if HAS_BIAS:
        sums += added[:, None]
    target = output + rows[None, :] * NUM_OUTPUTS + outputs[:, None]
    tl.store(target, sums.to(output.dtype.element_ty), mask=is_output[:, None] & (rows < num_rows)[None, :])


def entry_of(num_rows: int, num_outputs: int, num_inputs: int) -> str | None:
    """Returns the name of the entry in the table of sizes; None: these products are the vendor's library's."""
    if not 0 < num_rows <= MOST_ROWS:
        return None
    return f"{'one' if num_rows == 1 else 'few'} {'tall' if num_outputs > num_inputs else 'wide'}"


def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.LinearOp.pack`."""
    return PackedWeight(weight if weight.stride(-1) == 1 else weight.contiguous(), bias)


def run(packed: PackedWeight, x: Tensor, sizes: Sizes | None = None) -> Tensor:
    """See `ops.LinearOp.run`. sizes: others than this GPU's."""
    weight, bias = packed
    num_rows, (num_outputs, num_inputs) = x.shape[0], weight.shape
    entry = entry_of(num_rows, num_outputs, num_inputs)
    sizes = sizes or tuning.sizes_for(x.device, x.dtype)
    block = None if entry is None else sizes.linear.get(entry)
    if block is None:
        return functional.linear(x, weight, bias)
    if x.stride(-1) != 1:
        x = x.contiguous()
    output = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    _few_rows_kernel[(triton.cdiv(num_outputs, block.outputs), triton.cdiv(num_rows, block.rows))](
        output, x, weight, weight if bias is None else bias, num_rows, x.stride(0), weight.stride(0),
        NUM_OUTPUTS=num_outputs, NUM_INPUTS=num_inputs, HAS_BIAS=bias is not None, ROWS=block.rows,
        BLOCK_N=block.outputs, BLOCK_K=block.inputs, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=block.num_warps, num_stages=block.num_stages, **tuning.start_of(sizes, x.device),
    )  # fmt: skip
    return output
