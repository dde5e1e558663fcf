"""Products of the native library: the weight layouts of matmul.h (floats) and integers.h (int8, int4), and the call."""

from typing import Final, NamedTuple

import torch
from torch.nn import functional

from inferflux.kernels.native.calls import PRODUCT, TYPES, call, expect_same
from inferflux.kernels.quantized_weight import INT4_GROUP, QuantizedWeight

Tensor = torch.Tensor
# As in matmul.h.
PANEL: Final = 16
INTEGERS: Final = ("int8", "int4")
# Columns of 4 bits whose products are added up at once, as in integers.h.
INT4_TOGETHER: Final = 4


class Panels(NamedTuple):
    """A matrix, 16 outputs a panel; outputs are filled up to a multiple of 16.

    float32: values [panels, columns, 16]. bfloat16, fp8: values [panels, columns / 2, 16, 2], filled up to an even
    number of columns. All: scales float32 [outputs], or None.
    int8: values [panels, columns / 2, 16, 2], each output's columns in pairs, filled up to a multiple of 32 columns.
    int4: uint8 [panels, columns / 8, 16, 4], columns 8i to 8i + 3 in the low halves of the bytes, the next four in the
    high ones. Both: scales float32 [panels, groups, 16].
    """

    values: Tensor
    scales: Tensor | None
    num_outputs: int
    num_inputs: int


def arrange_floats(weight: Tensor) -> Panels:
    """weight [out, in] of float32 or bfloat16, on the CPU. Copies it."""
    panels = _panels(weight, 1) if weight.dtype == torch.float32 else _panels(_filled(weight, 2), 2)
    return Panels(panels, None, weight.shape[0], weight.shape[1])


def arrange(weight: QuantizedWeight) -> Panels:
    """weight: of any scheme, on the CPU. Copies it."""
    num_outputs, num_inputs = weight.shape
    values = weight.values
    if weight.scheme not in INTEGERS:
        return Panels(_panels(_filled(values, 2), 2), weight.scales.flatten(), num_outputs, num_inputs)
    together = 2
    if weight.scheme == "int8":
        values = _filled(values, INT4_GROUP)
    else:
        together = INT4_TOGETHER
        # A byte here holds columns 2i, 2i + 1.
        columns = torch.stack((values & 0xF, values >> 4), dim=-1).view(num_outputs, -1, 2, together)
        values = (columns[:, :, 0] | columns[:, :, 1] << 4).flatten(1)
    return Panels(_panels(values, together), _panels(weight.scales, 1), num_outputs, num_inputs)


def _filled(matrix: Tensor, multiple: int) -> Tensor:
    """[out, in] with columns of zeros behind, up to a multiple of so many."""
    missing = -matrix.shape[1] % multiple
    bytes_ = matrix.view(torch.uint8) if matrix.element_size() == 1 else matrix  # of fp8 torch fills nothing up
    return functional.pad(bytes_, (0, missing)).view(matrix.dtype) if missing else matrix


def _panels(matrix: Tensor, together: int) -> Tensor:
    """[out, in] -> [panels, in / together, 16, together], the last axis dropped where it is 1."""
    one_byte = matrix.element_size() == 1
    rows, missing = matrix.view(torch.uint8) if one_byte else matrix, -len(matrix) % PANEL
    if missing:  # else padding would copy for nothing
        rows = functional.pad(rows, (0, 0, 0, missing))
    panels = rows.view(-1, PANEL, matrix.shape[1] // together, together).transpose(1, 2).contiguous()
    return (panels.view(matrix.dtype) if one_byte else panels).squeeze(3)


def multiply(panels: Panels, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] -> [T, out], in x's dtype, summed in float32; integers: x is rounded, each row's every 512 columns to
    16 bits with a scale of their own, or, beside int4, every 32 to 8 bits."""
    expect_same("columns of x", x.shape[1], panels.num_inputs)
    dtype = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
    rows = x.to(dtype).contiguous()
    if bias is not None:
        bias = bias.to(dtype)
    y = torch.empty((x.shape[0], panels.num_outputs), dtype=dtype)
    sizes = (x.shape[0], panels.num_outputs, x.shape[1])
    tensors = (panels.values, panels.scales, bias, rows, y)
    call(PRODUCT, TYPES[panels.values.dtype], tensors, *sizes, TYPES[dtype])
    return y.to(x.dtype)
