"""Pages of 8 bits (see `narrow_kv`) as Triton sees them: codes by one pointer, their scales by another."""

import torch

from inferflux.kernels.narrow_kv import as_bytes, is_narrow


def scales_of(kv_pages: torch.Tensor) -> torch.Tensor:
    """Returns narrow pages as float32: of each head the last element is its scale, all others are codes. Other pages
    have none; any tensor serves as the pointer that is never read."""
    return as_bytes(kv_pages).view(torch.float32) if is_narrow(kv_pages) else kv_pages
