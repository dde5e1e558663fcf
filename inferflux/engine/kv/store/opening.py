"""From the configuration to what moves pages: the host pool and the file behind it. Every rank opens its own."""

import time
from pathlib import Path

import torch

from inferflux.config import RuntimeConfig
from inferflux.dist.context import ParallelContext
from inferflux.engine.kv.lower_tiers import num_host_pages
from inferflux.engine.kv.store.copier import make_copier
from inferflux.engine.kv.store.file_tier import FileTier
from inferflux.engine.kv.store.host import allocate_host_pool
from inferflux.engine.kv.store.mover import Mover
from inferflux.engine.kv.store.page_file import Layout
from inferflux.engine.kv.store.shared_moves import SharedMoves

_GIGABYTE = 10**9


def open_tiers(
    runtime: RuntimeConfig, device_pool: torch.Tensor, fingerprint: bytes, context: ParallelContext, free_bytes: int
) -> SharedMoves | None:
    """Returns what moves pages between the tiers that `runtime` asks for, None when it asks for none.

    fingerprint: names model, page and rank. Ranks but the first add their number to the file's name. free_bytes: of
    host memory. Raises ConfigError when that is too little; a file that cannot be opened is no error, but a tier that
    is off.
    """
    num_pages = num_host_pages(runtime)
    if not num_pages:
        return None
    page_bytes = device_pool[0].numel() * device_pool.element_size()
    host_pool = allocate_host_pool(num_pages, page_bytes, device_pool.device, free_bytes)
    settings = runtime.nvme_offload
    file = None
    if settings.path is not None:
        layout = Layout(page_bytes, fingerprint)
        max_bytes = int(settings.max_gb * _GIGABYTE)
        path = Path(f"{settings.path}.{context.rank}" if context.rank else settings.path)
        file = FileTier(path, layout, max_bytes, keep=settings.persist, clock=time.monotonic)
    return SharedMoves(
        Mover(make_copier(device_pool, host_pool), file, settings.workers), context, has_file=file is not None
    )
