"""Keys and values in 8 bits (`runtime.paged_kv.dtype`: int8, fp8): how a quantised page is laid out, and the way there.

A pool in the model's own type is [..., N, K, D]; a quantised one is [..., N, K, D + 4], of type int8 or float8_e4m3fn,
and is laid out alike in every other respect, so that a page is still one contiguous span. Of each token's head it holds
the D codes, and behind them, in the last 4 bytes, their scale as a float32:

    value = code * scale,  scale = largest magnitude among the D values / largest code (127; 448)

A head's D is a multiple of 4, so that scales stand on multiples of 4 bytes. int8 codes are rounded to the nearest, ties
to even. Torch moves float8 tensors only in part, so everything that indexes does it on the same bytes as int8.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

Tensor = torch.Tensor

SCALE_BYTES: Final = 4
# Of a head that is all zeros: no division by zero, nor by what a CPU may flush to it.
SMALLEST: Final = 1e-30
LARGEST_CODE: Final[Mapping[torch.dtype, float]] = MappingProxyType({torch.int8: 127.0, torch.float8_e4m3fn: 448.0})


def is_quantized(kv_pages: Tensor) -> bool:
    """Whether the pages, or their pool, are of 8 bits."""
    return kv_pages.dtype in LARGEST_CODE


def quantize(values: Tensor, kv_dtype: torch.dtype) -> Tensor:
    """values [..., D] -> rows as int8 [..., D + 4], to be written into pages of kv_dtype."""
    wide = values.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST) / LARGEST_CODE[kv_dtype]
    codes = wide / scale
    rounded = codes.round_().to(kv_dtype) if kv_dtype == torch.int8 else codes.to(kv_dtype)
    return torch.cat((rounded.view(torch.int8), scale.view(torch.int8)), dim=-1)


def dequantize(rows: Tensor, kv_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """rows int8 [..., D + 4], as they lie in pages of kv_dtype -> values [..., D] of `dtype`, rounded once."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.view(kv_dtype).to(wide) * scale.to(wide)).to(dtype)


def as_bytes(kv_pages: Tensor) -> Tensor:
    """Returns quantised pages as int8, for indexing; the same memory."""
    return kv_pages.view(torch.int8)
