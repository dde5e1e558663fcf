"""How many threads an engine computes with where its control group may not use every core.

PyTorch takes a thread for each core it sees. In a container with a limit of a few CPUs on a machine of many, those
threads spend the limit by waiting for each other, and the kernel stops all of them until the next tenth of a second.
"""

import logging
from pathlib import Path
from typing import Final

import torch

from inferflux.config.child_env import has_chosen_threads

_CGROUP: Final = Path("/sys/fs/cgroup")

_logger = logging.getLogger(__name__)


def keep_to_quota() -> None:
    """Lowers PyTorch's threads, which the native kernels take too, to the whole CPUs that the control group allows."""
    quota = cpu_quota(_CGROUP)
    if quota is None or has_chosen_threads():
        return
    allowed, found = max(1, int(quota)), torch.get_num_threads()
    if allowed < found:
        torch.set_num_threads(allowed)
        _logger.info("computing with %d threads instead of %d: the CPU limit is %g", allowed, found, quota)


def cpu_quota(root: Path) -> float | None:
    """Returns the CPUs of the control group as a container sees it (version 2, else 1), or None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in files).split()
            return int(quota) / int(period) if quota not in ("max", "-1") else None
        except (OSError, ValueError):
            continue
    return None
