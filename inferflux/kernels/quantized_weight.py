"""QuantizedWeight: a matrix kept in few bits, and how it is made of floats. The definition, not the fast way.

Symmetric rounding to nearest: int8 and fp8 have one scale per row (output), int4 one per 32 columns. Knows no model and
no kernel.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch

Tensor = torch.Tensor
Scheme = Literal["int8", "int4", "fp8"]

# Columns that share a scale in int4: 4 bits and a 32nd of a scale's 32.
INT4_GROUP: Final = 32
_INT4_ZERO: Final = 8
_FP8: Final = torch.float8_e4m3fn
_FP8_MAX: Final = 448.0
_INT8_MAX: Final = 127.0


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """weight[o, i] = value[o, i] * scales[o, i // group], where group is all `num_inputs` columns (int8, fp8) or 32.

    values, contiguous: int8 [out, in], within -127..127; fp8: float8_e4m3fn [out, in]; int4: uint8 [out, groups * 16],
    two columns a byte, the even one in its low 4 bits, each as value + 8. Columns that fill the last group of 32 up are
    zero (8). scales: float32 [out, groups], contiguous; an int4 group's may be negative.
    """

    scheme: Scheme
    values: Tensor
    scales: Tensor
    num_inputs: int

    @property
    def num_outputs(self) -> int:
        return int(self.values.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    def rows(self, first: int, last: int) -> "QuantizedWeight":
        """Returns rows first..last-1, as views."""
        return QuantizedWeight(self.scheme, self.values[first:last], self.scales[first:last], self.num_inputs)

    def select(self, rows: Tensor) -> "QuantizedWeight":
        """Returns the rows named by int64 [n], copied."""
        values = self.values.view(torch.uint8).index_select(0, rows).view(self.values.dtype)
        return QuantizedWeight(self.scheme, values, self.scales.index_select(0, rows), self.num_inputs)


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """weight [out, in] of any float type. What is not a number makes its scale not one either."""
    return quantize_blocks([weight], weight.shape, scheme)


def quantize_blocks(blocks: Iterable[Tensor], shape: tuple[int, ...], scheme: Scheme) -> QuantizedWeight:
    """Quantises a matrix of `shape` that comes in blocks of whole rows, top to bottom, holding one block at a time."""
    num_outputs, num_inputs = shape
    values, scales, first = None, None, 0
    for block in blocks:
        part_values, part_scales = _QUANTIZE[scheme](block.float())
        if values is None or scales is None:
            values = part_values.new_empty((num_outputs, part_values.shape[1]))
            scales = part_scales.new_empty((num_outputs, part_scales.shape[1]))
        values[first : first + len(block)], scales[first : first + len(block)] = part_values, part_scales
        first += len(block)
    assert values is not None
    assert scales is not None
    assert first == num_outputs, f"{first} rows of {num_outputs}"
    return QuantizedWeight(scheme, values, scales, num_inputs)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Returns [out, in] in `dtype`, values and scales multiplied in it."""
    scales = weight.scales.to(dtype)
    if weight.scheme != "int4":
        return weight.values.to(dtype).mul_(scales)
    halves = torch.stack((weight.values & 0xF, weight.values >> 4), dim=-1)
    groups = halves.view(weight.num_outputs, -1, INT4_GROUP).to(dtype).sub_(_INT4_ZERO).mul_(scales.unsqueeze(2))
    return groups.flatten(1)[:, : weight.num_inputs]


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = _nonzero(weight.abs().amax(dim=1, keepdim=True) / _INT8_MAX)
    return (weight / scales).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = _nonzero(weight.abs().amax(dim=1, keepdim=True) / _FP8_MAX)
    return (weight / scales).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8), scales


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The entry furthest from zero becomes -8, so that all 16 values are used (llama.cpp's Q4_0 does the same)."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % INT4_GROUP))
    groups = padded.view(len(weight), -1, INT4_GROUP)
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = _nonzero(furthest / -_INT4_ZERO)
    values = (groups / scales).round_().clamp_(-_INT4_ZERO, _INT4_ZERO - 1).add_(_INT4_ZERO).to(torch.uint8)
    low, high = values.view(len(weight), -1, 2).unbind(2)
    return low | (high << 4), scales.squeeze(2)


def _nonzero(scales: Tensor) -> Tensor:
    return scales.masked_fill_(scales == 0, 1.0)


_QUANTIZE: Final[Mapping[Scheme, Callable[[Tensor], tuple[Tensor, Tensor]]]] = MappingProxyType(
    {"int8": _int8, "int4": _int4, "fp8": _fp8}
)
