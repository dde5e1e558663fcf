"""Products with int8 and int4 weights in integers: the layout that integers.h multiplies, and the call."""

import struct
from typing import Final, NamedTuple

import torch
from torch.nn import functional

from inferflux.kernels.native.loading import TYPES, library
from inferflux.kernels.quantized_weight import INT4_GROUP, QuantizedWeight

Tensor = torch.Tensor
# IntegersCall and PANEL of integers.h.
_CALL = struct.Struct("8qi4x")
PANEL: Final = 16
SCHEMES: Final = ("int8", "int4")


class Panels(NamedTuple):
    """A matrix, 16 outputs a panel; outputs and columns are filled up to multiples of 16 and 32.

    values: int8 [panels, columns / 2, 16, 2], each output's columns in pairs; int4: uint8 [panels, columns / 4, 16, 2],
    the pair of columns 4i, 4i + 1 in the low halves of the bytes, 4i + 2, 4i + 3 in the high ones. scales: float32
    [panels, groups, 16].
    """

    values: Tensor
    scales: Tensor
    num_outputs: int


def arrange(weight: QuantizedWeight) -> Panels:
    """weight: int8 or int4, on the CPU. Copies it."""
    num_outputs, num_inputs = weight.shape
    values = weight.values
    if weight.scheme == "int8":
        values = functional.pad(values, (0, -num_inputs % INT4_GROUP))
    else:
        # A byte here holds columns 2i, 2i + 1.
        both = values.view(num_outputs, -1, 2)
        low, high = both & 0xF, both >> 4
        values = torch.stack((low[..., 0] | low[..., 1] << 4, high[..., 0] | high[..., 1] << 4), dim=-1).flatten(1)
    missing = -num_outputs % PANEL
    values = functional.pad(values, (0, 0, 0, missing)).view(-1, PANEL, values.shape[1] // 2, 2)
    scales = functional.pad(weight.scales, (0, 0, 0, missing)).view(-1, PANEL, weight.scales.shape[1])
    return Panels(values.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous(), num_outputs)


def multiply(panels: Panels, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] -> [T, out], in x's dtype; x is rounded to 16 bits, each row's every 512 columns to their own scale."""
    rows = x.float().contiguous()
    y = torch.empty((x.shape[0], panels.num_outputs), dtype=torch.float32)
    wide_bias = None if bias is None else bias.float()
    call = _CALL.pack(
        panels.values.data_ptr(),
        panels.scales.data_ptr(),
        rows.data_ptr(),
        0 if wide_bias is None else wide_bias.data_ptr(),
        y.data_ptr(),
        *x.shape[:1],
        panels.num_outputs,
        x.shape[1],
        torch.get_num_threads(),
    )
    library().integers(TYPES[panels.values.dtype], call)
    return y.to(x.dtype)
