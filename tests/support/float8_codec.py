"""The way to float8 and back that Triton's kernels take where a GPU lacks it, on numbers side by side.

In a file, because Triton reads the sources of what it runs there.
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.triton.codes import rounded_to_float8, widened


@triton.jit
def _both_ways(wide, rounded, codes, values, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(wide + places, widened(tl.load(codes + places), tl.float32))
    tl.store(rounded + places, rounded_to_float8(tl.load(values + places)))


def both_ways(codes: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """codes uint8 [n], values float32 [n], n a power of two. Returns the codes' values and the values' codes."""
    wide, rounded = torch.empty_like(values), torch.empty_like(codes)
    _both_ways[(1,)](wide, rounded, codes, values, SIZE=len(codes))
    return wide, rounded
