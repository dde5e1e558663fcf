"""Matrix product whose weights lie as this machine multiplies them fastest. The op is this module: `pack` and `run`.

On a CPU layout and method are the table's choice (`cpu_table`, `products`); elsewhere the weights stay as they came.
"""

from typing import Any, NamedTuple

import torch

from inferflux.kernels.cpu_table import BUCKETS, Layout, Method, bucket_of, cpu_table
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.torch.products import LINEAR, float_layouts

Tensor = torch.Tensor

# A oneDNN primitive costs about 20 us before it computes: [64, 64] x 1 row takes 23 us packed and 3 us plain,
# [256, 256] 28 and 8, [576, 576] 48 and 42, [576, 576] x 4 rows 62 and 89. 2 cores of a Zen 3 EPYC, torch 2.13.
MIN_PACKED_ELEMENTS = 2**18


class PackedWeight(NamedTuple):
    """weight: in the layout that the methods want, of which there is one per bucket of rows."""

    methods: tuple[Method, ...]
    weight: Any
    bias: Tensor | None


def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.LinearOp.pack`."""
    if weight.device.type != "cpu":
        return PackedWeight((LINEAR,) * len(BUCKETS), weight, bias)
    layouts = float_layouts(weight.dtype)
    if weight.numel() < MIN_PACKED_ELEMENTS:
        light = min((layout for layout in layouts if layout.name != "onednn"), key=_needs_python)
        return PackedWeight(light.defaults(), light.arrange(weight), bias)
    num_outputs, num_inputs = weight.shape
    choice = cpu_table().choose(
        f"{dtype_name(weight.dtype)} {num_outputs}x{num_inputs}",
        layouts,
        num_outputs,
        lambda elements: weight[: max(1, elements // num_inputs)],
        weight.dtype,
    )
    return PackedWeight(choice.methods, choice.layout.arrange(weight), bias)


def _needs_python(layout: Layout) -> bool:
    """Whether a product keeps decode steps off their tape."""
    return not all(method.on_tape for method in layout.defaults())


def run(packed: PackedWeight, x: Tensor) -> Tensor:
    """See `ops.LinearOp.run`."""
    methods, weight, bias = packed
    return methods[bucket_of(x.shape[0])].run(weight, x, bias)
