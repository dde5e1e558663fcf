"""Which pages the native kernels read and write in place."""

import torch

from inferflux.kernels.quantized_kv import SCALE_BYTES, is_quantized

Tensor = torch.Tensor


def fits(kv_pages: Tensor, heads: Tensor) -> bool:
    """Whether the pages [P, 2, N, K, D], or quantised ones, fit the heads [T, H, D]: of one type unless quantised, and
    a token's heads side by side."""
    size = heads.shape[2] + SCALE_BYTES if is_quantized(kv_pages) else heads.shape[2]
    same_type = is_quantized(kv_pages) or kv_pages.dtype == heads.dtype
    return same_type and kv_pages.shape[4] == size and kv_pages.stride()[3:] == (size, 1)
