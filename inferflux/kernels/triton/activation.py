"""Gated activations (SwiGLU and GeGLU, Shazeer, arXiv 2002.05202): activation and product in one pass.

The stride is a size of the model: the compiler is told that it is a multiple of 16, else it reads two bytes at a time.
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.triton.start import begin


@triton.jit
def _gate_kernel(
    output,
    gate_up,
    stride_row,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (row, block of columns)."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up + row * stride_row + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        active = gate * tl.sigmoid(gate)
    elif KIND == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(y)) is sigmoid(2y); 1.5957691216057308 is 2 * sqrt(2 / pi).
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(output + row * SIZE + columns, (active * up).to(output.dtype.element_ty), mask=mask)


def activation(gate_up: torch.Tensor, kind: ActivationKind, sizes: Sizes | None = None) -> torch.Tensor:
    """See `ops.ActivationOp`. sizes: others than this GPU's."""
    if gate_up.stride(-1) != 1:
        gate_up = gate_up.contiguous()
    num_tokens, double = gate_up.shape
    size = double // 2
    output = gate_up.new_empty((num_tokens, size))
    sizes = sizes or tuning.sizes_for(gate_up.device, gate_up.dtype)
    block = sizes.blocks["activation"]
    _gate_kernel[(num_tokens, triton.cdiv(size, block.size))](
        output, gate_up, gate_up.stride(0), SIZE=size, KIND=kind, BLOCK=block.size, num_warps=block.num_warps,
        **tuning.start_of(sizes, gate_up.device),
    )  # fmt: skip
    return output
