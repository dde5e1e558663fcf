"""How many threads an engine computes with where its control group may not use every core.

PyTorch takes a thread for each core it sees. In a container with a limit of a few CPUs on a machine of many, those
threads spend the limit by waiting for each other, and the kernel stops all of them until the next tenth of a second.
"""

import logging
from pathlib import Path

import torch

from inferflux.config.process_env import has_chosen_threads
from inferflux.engine.runner.control_groups import ROOT, folders

_logger = logging.getLogger(__name__)


def keep_to_quota() -> None:
    """Lowers PyTorch's threads, which the native kernels take too, to the whole CPUs that the control groups allow."""
    quota = cpu_quota(ROOT)
    if quota is None or has_chosen_threads():
        return
    allowed, found = max(1, int(quota)), torch.get_num_threads()
    if allowed < found:
        torch.set_num_threads(allowed)
        _logger.info("computing with %d threads instead of %d: the CPU limit is %g", allowed, found, quota)


def cpu_quota(root: Path) -> float | None:
    """Returns the CPUs of the narrowest of the process's control groups, or None without a limit."""
    quotas = [quota for folder in folders("cpu", root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in files).split()
            return int(quota) / int(period) if quota not in ("max", "-1") else None
        except (OSError, ValueError):
            continue
    return None
