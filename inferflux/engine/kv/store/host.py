"""The host tier's bytes: one row per page, pinned where a GPU copies from and to it. Knows no page's owner."""

import numpy as np
import torch

from inferflux.errors import ConfigError


def allocate_host_pool(num_pages: int, page_bytes: int, device: torch.device, free_bytes: int) -> torch.Tensor:
    """Returns uint8 [num_pages, page_bytes]. On a CPU the system hands the memory out as pages are first written.

    Raises ConfigError when free_bytes are fewer.
    """
    if num_pages * page_bytes > free_bytes:
        raise ConfigError(
            f"runtime.paged_kv.cpu_pages: {num_pages} pages of {page_bytes / 2**20:.4g} MiB exceed the "
            f"{free_bytes / 2**20:.4g} MiB of free memory; at most {free_bytes // page_bytes} fit"
        )
    if device.type == "cuda":
        return torch.empty((num_pages, page_bytes), dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.zeros((num_pages, page_bytes), np.uint8))
