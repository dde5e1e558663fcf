"""Matrix product with a quantised weight: widened one cache-sized block of rows at a time, then multiplied.

The op is this module: `pack` and `run`.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from inferflux.kernels.quantized_weight import QuantizedWeight, dequantize

Tensor = torch.Tensor

# Bytes of a widened block: see BLOCK_BYTES of `linear`.
BLOCK_BYTES = 4 * 2**20


class PackedWeight(NamedTuple):
    weight: QuantizedWeight
    bias: Tensor | None


def pack(weight: QuantizedWeight, bias: Tensor | None) -> PackedWeight:
    """See `ops.QuantizedLinearOp.pack`."""
    return PackedWeight(weight, bias)


def run(packed: PackedWeight, x: Tensor) -> Tensor:
    """See `ops.QuantizedLinearOp.run`."""
    weight, bias = packed
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, y = x.to(wide), torch.empty((len(x), weight.num_outputs), dtype=x.dtype, device=x.device)
    wide_bias = None if bias is None else bias.to(wide)
    step = max(1, BLOCK_BYTES // (wide.itemsize * weight.num_inputs))
    for first in range(0, weight.num_outputs, step):
        last = min(first + step, weight.num_outputs)
        block = dequantize(weight.rows(first, last), wide)
        y[:, first:last] = functional.linear(rows, block, None if wide_bias is None else wide_bias[first:last])
    return y
