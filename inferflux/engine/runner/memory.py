"""Decides how many KV pages to allocate, and how long a request may get.

Works on plain numbers, but for measuring free memory. `kv.store.device` allocates.
"""

import logging
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.runner.control_groups import ROOT, folders
from inferflux.errors import ConfigError, ModelLoadError

logger = logging.getLogger(__name__)

# A GPU is ours alone: what is left over is for activations. A CPU's memory is shared with everything else.
DEFAULT_FRACTION = {"cuda": 0.9, "cpu": 0.25}
# What the prefix cache may bring into use on a CPU for a model with smaller weights: a prompt that
# fills SmolLM2-135M's window of 8192 tokens takes 180 MiB in bfloat16.
LEAST_CACHE_BYTES = 192 * 2**20
# A model whose pool cannot hold this many tokens is refused.
MIN_USEFUL_TOKENS = 256

_MEMINFO = Path("/proc/meminfo")


class PoolPlan(NamedTuple):
    """num_pages: pages to allocate. max_model_len: tokens the longest request may have."""

    num_pages: int
    max_model_len: int


class FreeMemory(NamedTuple):
    """Bytes free on a kind of device (`cuda` or `cpu`) once the weights are loaded. limit: most bytes that the pool may
    take of them, if any. working: what steps take of them (see `working_memory`)."""

    kind: str
    num_bytes: int
    limit: int | None = None
    working: int = 0

    def without(self, num_bytes: int) -> "FreeMemory":
        """Returns what is left when others take num_bytes of it."""
        return self._replace(num_bytes=max(0, self.num_bytes - num_bytes))

    def shared(self, num_ranks: int) -> "FreeMemory":
        """Returns what one of num_ranks ranks may count on: each has a GPU of its own, but a CPU's memory they share
        (as if all were on this host)."""
        return self if self.kind == "cuda" else FreeMemory(self.kind, self.num_bytes // num_ranks)


def plan_pool(model: ModelConfig, runtime: RuntimeConfig, window: int, page_bytes: int, free: FreeMemory) -> PoolPlan:
    """Sizes the pool for requests of up to `window` tokens with pages of page_bytes bytes.

    Raises ConfigError when the settings cannot be met, ModelLoadError when memory is too short for any use. If
    models[].max_model_len is not set, the window shrinks to what fits, with a warning.
    """
    page_tokens = runtime.paged_kv.page_tokens
    num_pages = _num_pages(runtime, math.ceil(window / page_tokens), page_bytes, free)
    held = num_pages * page_tokens
    if held >= window:
        return PoolPlan(num_pages, window)
    if not runtime.paged_kv.device_pages and held < MIN_USEFUL_TOKENS:
        needed = math.ceil(min(window, MIN_USEFUL_TOKENS) / page_tokens)
        raise ModelLoadError(
            f"{model.id}: of {_megabytes(free.num_bytes)} free memory, the KV cache's share holds {held} tokens; "
            f"{_megabytes((needed - num_pages) * page_bytes)} more are needed: free some memory, or {_advice(free)}"
        )
    if model.max_model_len is not None:
        raise ConfigError(
            f"models[].max_model_len: {window} tokens need {math.ceil(window / page_tokens)} KV pages of "
            f"{_megabytes(page_bytes)}, but there are {num_pages}; lower it to at most {held}, or raise "
            "runtime.paged_kv.device_pages or device_memory_fraction"
        )
    logger.warning("%s: max_model_len is %d, not %d: %d KV pages hold no more", model.id, held, window, num_pages)
    return PoolPlan(num_pages, held)


def plan_cache(runtime: RuntimeConfig, weight_bytes: int, page_bytes: int, memory: FreeMemory) -> int | None:
    """Returns how many pages the prefix cache may bring into use, however large the pool; None: all of them.

    Unless somebody said how large the pool is to be, it makes a CPU's engine grow by as much as the weights take: the
    larger those are, the longer it takes to compute anew what was dropped. Requests have the whole pool.
    """
    is_sized = runtime.paged_kv.device_pages or runtime.paged_kv.device_memory_fraction or memory.limit is not None
    return None if is_sized or memory.kind != "cpu" else max(weight_bytes, LEAST_CACHE_BYTES) // page_bytes


def _num_pages(runtime: RuntimeConfig, pages_per_request: int, page_bytes: int, free: FreeMemory) -> int:
    settings = runtime.paged_kv
    fitting = free.num_bytes // page_bytes
    allowed = fitting if free.limit is None else min(fitting, free.limit // page_bytes)
    if settings.device_pages:
        if settings.device_pages > allowed:
            raise ConfigError(
                f"runtime.paged_kv.device_pages: {settings.device_pages} pages of {_megabytes(page_bytes)} exceed the "
                f"{_megabytes(allowed * page_bytes)} that are free or in the model's budget; at most {allowed} fit"
            )
        return settings.device_pages
    fraction = settings.device_memory_fraction or DEFAULT_FRACTION[free.kind]
    beside_steps = max(0, free.num_bytes - free.working) // page_bytes
    usable = min(allowed, int(fitting * fraction), beside_steps)
    return min(usable, runtime.scheduler.max_batch_size * pages_per_request + 1)


def _advice(free: FreeMemory) -> str:
    raised = "runtime.paged_kv.device_memory_fraction"
    if free.limit is not None:
        raised += " or models[].memory_gb"
    if not free.working:
        return f"raise {raised}"
    return f"lower runtime.scheduler.max_batch_tokens (a step needs {_megabytes(free.working)}), or raise {raised}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.4g} MiB"


def free_memory(device: torch.device) -> FreeMemory:
    """Measures what is free now; on the CPU within the limits of this process's control groups."""
    if device.type == "cuda":
        return FreeMemory("cuda", torch.cuda.mem_get_info(device)[0])
    available = [amount for amount in (_system_available(), _cgroup_available(ROOT)) if amount is not None]
    return FreeMemory("cpu", max(0, min(available)))


def _system_available() -> int:
    """Returns the memory available without swapping; if the system does not say, half of all memory."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_available(root: Path) -> int | None:
    """Bytes left in the fullest of the process's control groups, or None without a limit."""
    left = [amount for folder in folders("memory", root) if (amount := _left(folder)) is not None]
    return min(left, default=None)


def _left(folder: Path) -> int | None:
    for limit_file, usage_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = (folder / limit_file).read_text().strip(), int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # File cache counts as usage but is freed when memory is needed.
        return None if limit == "max" else int(limit) - usage + int(stat.get(cache_key, 0))
    return None
