"""8 bits as Triton sees them: codes by one pointer, the scales of quantised pages (see `quantized_kv`) by another.

float8 is taken apart and put together bit by bit where the GPU has no instructions for it (before Ada and Hopper, for
which Triton does not compile it), and under the interpreter, which loses a carry in rounding to it.
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.quantized_kv import as_bytes, is_quantized
from inferflux.kernels.triton import tuning

# The exponents of float32 and e4m3 are biased by 127 and by 7.
BIAS = tl.constexpr(2.0**120)


@triton.jit
def widened(codes, dtype: tl.constexpr):
    """Codes as they lie in memory -> `dtype`; those of uint8 are e4m3 (no number but a NaN is lost on the way)."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.int32)
        wide = (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * BIAS
    else:
        wide = codes
    return wide.to(dtype)


@triton.jit
def rounded_to_float8(values):
    """float32 within +-448 -> e4m3 as uint8, to the nearest, ties to even."""
    bits = (values * (1.0 / BIAS)).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    return (((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) | ((bits >> 24) & 0x80)).to(tl.uint8)


def codes_of(values: torch.Tensor) -> torch.Tensor:
    """Returns pages or weights as the kernels want them: float8 as bytes where it cannot be read otherwise."""
    if values.dtype != torch.float8_e4m3fn or tuning.gpu_of(values.device).has_float8:
        return values
    return values.view(torch.uint8)


def scales_of(kv_pages: torch.Tensor) -> torch.Tensor:
    """Returns quantised pages as float32: of each head the last element is its scale, all others are codes. Other pages
    have none; any tensor serves as the pointer that is never read."""
    return as_bytes(kv_pages).view(torch.float32) if is_quantized(kv_pages) else kv_pages
