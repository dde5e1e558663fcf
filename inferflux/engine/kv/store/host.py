"""The host tier's bytes: one row per page, pinned where a GPU copies from and to it. Knows no page's owner."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from inferflux.errors import ConfigError

# torch rounds what it pins up to a power of two: a pool in one piece could take twice its size.
PIECE_BYTES: Final = 2**30


class HostPool:
    """Rows by slot number, uint8 [page_bytes]. pieces: what they are in, [rows, page_bytes] each; all but the last have
    the same number of rows."""

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self.pieces = pieces

    def __getitem__(self, slot: int) -> torch.Tensor:
        piece, row = divmod(slot, len(self.pieces[0]))
        return self.pieces[piece][row]


def allocate_host_pool(num_pages: int, page_bytes: int, device: torch.device, free_bytes: int) -> HostPool:
    """Returns num_pages rows. On a CPU they are in one piece, and the system hands the memory out as pages are first
    written.

    Raises ConfigError when free_bytes are fewer, or so much cannot be pinned.
    """
    if num_pages * page_bytes > free_bytes:
        raise ConfigError(
            f"runtime.paged_kv.cpu_pages: {num_pages} pages of {page_bytes / 2**20:.4g} MiB exceed the "
            f"{free_bytes / 2**20:.4g} MiB of free memory; at most {free_bytes // page_bytes} fit"
        )
    if device.type != "cuda":
        return HostPool([torch.from_numpy(np.zeros((num_pages, page_bytes), np.uint8))])
    rows = max(1, PIECE_BYTES // page_bytes)
    shapes = [(min(rows, num_pages - first), page_bytes) for first in range(0, num_pages, rows)]
    try:
        return HostPool([torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in shapes])
    except RuntimeError as error:
        raise ConfigError(
            f"runtime.paged_kv.cpu_pages: {num_pages} pages of {page_bytes / 2**20:.4g} MiB cannot be pinned: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
