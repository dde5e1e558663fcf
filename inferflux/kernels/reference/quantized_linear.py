"""Matrix product with a quantised weight matrix: widened, then multiplied. The op is this module: `pack` and `run`."""

import torch

from inferflux.kernels.quantized_weight import QuantizedWeight, dequantize

Tensor = torch.Tensor


def pack(weight: QuantizedWeight, bias: Tensor | None) -> tuple[QuantizedWeight, Tensor | None]:
    """See `ops.QuantizedLinearOp.pack`."""
    return weight, bias


def run(packed: tuple[QuantizedWeight, Tensor | None], x: Tensor) -> Tensor:
    """See `ops.QuantizedLinearOp.run`."""
    weight, bias = packed
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize(weight, wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
