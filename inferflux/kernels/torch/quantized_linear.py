"""Matrix product with a quantised weight. The op is this module: `pack`, and the `run` of `linear`.

panels: int8 and int4 products in the native library, whose inputs are rounded to 16 and 8 bits. onednn8: int8 products
in oneDNN, whose inputs are rounded in two halves of 7 bits each. Both lose little, whatever else is in the batch and
however far a model's outliers lie out. values: as they came, widened one cache-sized block at a time, or multiplied by
the native kernel (fp8, few rows). On CPUs the table chooses.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from inferflux.kernels import cpu_features
from inferflux.kernels.cpu_table import BUCKETS, Layout, Method, cpu_table
from inferflux.kernels.native import panels
from inferflux.kernels.native.loading import library
from inferflux.kernels.quantized_weight import QuantizedWeight, dequantize
from inferflux.kernels.torch.linear import PackedWeight as PackedWeight
from inferflux.kernels.torch.linear import run as run
from inferflux.kernels.torch.products import multiply_blocks

Tensor = torch.Tensor

# Of `panels` and `onednn8`: see ops.QuantizedLinearOp.
rounds_inputs = True

# Smaller matrices are not worth measuring.
MIN_MEASURED_ELEMENTS = 2**18
# Seven bits: on CPUs without VNNI oneDNN adds pairs of products in 16 bits, which 8 would overflow.
_STEPS = 63.0
_ZERO = 64
_TINY = 1e-30


class Rounded(NamedTuple):
    """A matrix as oneDNN wants it, with what it is made of."""

    values: Any
    scales: Tensor
    zeros: Tensor


def pack(weight: QuantizedWeight, bias: Tensor | None) -> PackedWeight:
    """See `ops.QuantizedLinearOp.pack`."""
    if weight.values.device.type != "cpu":
        return PackedWeight((_ELSEWHERE,) * len(BUCKETS), weight, bias)
    layouts = quantized_layouts(weight.scheme)
    num_elements = weight.num_outputs * weight.num_inputs
    if num_elements < MIN_MEASURED_ELEMENTS:
        return PackedWeight(layouts[0].defaults(), layouts[0].arrange(weight), bias)
    choice = cpu_table().choose(
        f"{weight.scheme} {weight.num_outputs}x{weight.num_inputs}",
        layouts,
        weight.num_outputs,
        lambda elements: weight.rows(0, max(1, elements // weight.num_inputs)),
        torch.float32,
    )
    return PackedWeight(choice.methods, choice.layout.arrange(weight), bias)


def quantized_layouts(scheme: str) -> tuple[Layout, ...]:
    """Returns the layouts of a matrix on a CPU, the default first."""
    onednn8 = Layout("onednn8", _reorder, (Method("onednn8", _multiply_rounded),))
    if library().reason is not None:
        values = Layout("values", lambda weight: weight, (Method("widened", _widened),))
        return (values, onednn8) if scheme == "int8" and cpu_features.has_onednn() else (values,)
    packed = Layout("panels", panels.arrange, (Method("panels", panels.multiply, on_tape=True),))
    # Where oneDNN lacks the instructions, panels beat it at any number of rows (GOP/s of [3072, 576]: 45 to 5 at 1 row,
    # 97 to 63 at 128; one core of a Zen 3 EPYC).
    return (packed, onednn8) if scheme == "int8" and cpu_features.multiplies_bytes() else (packed,)


def _widened(weight: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float64:
        return _elsewhere(weight, x, bias)
    shape = (weight.num_outputs, weight.num_inputs)
    return multiply_blocks(x, bias, shape, lambda first, last: dequantize(weight.rows(first, last), torch.float32))


def _elsewhere(weight: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    matrix = dequantize(weight, x.dtype if x.device.type != "cpu" else wide)
    y = functional.linear(x.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype))
    return y.to(x.dtype)


def _reorder(weight: QuantizedWeight) -> Rounded:
    values = torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None)
    zeros = torch.zeros(weight.num_outputs, dtype=torch.int32)
    return Rounded(values, weight.scales.flatten(), zeros)


def _multiply_rounded(weight: Rounded, x: Tensor, bias: Tensor | None) -> Tensor:
    """Each row is scaled to +-63 and rounded; what is left of it, to +-0.5, is scaled to +-63 as well and is a row of
    its own."""
    rows = x.float()
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_(min=_TINY)
    scaled = rows * (_STEPS / largest)
    high = scaled.round()
    low = scaled.sub_(high).mul_(2 * _STEPS).round_()
    inputs = torch.cat((high, low)).add_(_ZERO).to(torch.uint8)
    both: Tensor = torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, _ZERO, weight.values, weight.scales, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y = torch.add(both[: len(x)], both[len(x) :], alpha=0.5 / _STEPS).mul_(largest / _STEPS)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


_ELSEWHERE = Method("widened", _elsewhere)
