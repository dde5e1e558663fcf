"""The device tier's bytes: one pool of pages that all layers share.

Page-major, [num_pages, num_layers, 2, page_tokens, num_kv_heads, head_dim] (0: keys, 1: values), so that a page is one
contiguous span and is the same bytes in every tier. Knows no request and no page's owner.
"""

from typing import NamedTuple

import numpy as np
import torch

from inferflux.errors import ModelLoadError

# A cache line, so that no head's row needlessly spans two.
ALIGNMENT = 64


class PageShape(NamedTuple):
    """What one page holds: the keys and values of `page_tokens` tokens in every layer."""

    num_layers: int
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        elements = self.num_layers * 2 * self.page_tokens * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize


def allocate_pool(num_pages: int, page: PageShape, device: torch.device) -> torch.Tensor:
    """Returns the pool, all zeros: kernels multiply masked values by zero, and leftovers could be NaN.

    On the CPU the memory is only reserved; the system hands it out, zeroed, as pages are first written.
    Raises ModelLoadError when there is not enough memory.
    """
    shape = (num_pages, page.num_layers, 2, page.page_tokens, page.num_kv_heads, page.head_dim)
    num_bytes = num_pages * page.num_bytes
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=page.dtype, device=device)
        # numpy asks the system for zeroed memory; torch.zeros would write, and so occupy, all of it.
        memory = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelLoadError(
            f"no memory for {num_pages} KV pages ({num_bytes / 2**30:.3g} GiB); lower runtime.paged_kv.device_pages or "
            "device_memory_fraction"
        ) from error
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes]).view(page.dtype).view(shape)
