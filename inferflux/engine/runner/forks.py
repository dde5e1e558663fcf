"""Forks of a process that computes on a CPU.

A fork has no threads but the one that made it, and OpenMP does not know: at its first product, torch's or ours, it
would wait for the others for ever.
"""

import functools
import os

import torch


@functools.cache
def compute_alone_in_forks() -> None:
    """From now on, forks of this process compute in one thread."""
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
