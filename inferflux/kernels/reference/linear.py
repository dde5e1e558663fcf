"""Matrix product with a weight matrix that is kept as it came. The op is this module: `pack` and `run`."""

import torch

Tensor = torch.Tensor


def pack(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See `ops.LinearOp.pack`."""
    return weight, bias


def run(packed: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    """See `ops.LinearOp.run`."""
    weight, bias = packed
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
