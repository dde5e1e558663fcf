"""The sizes of the Triton kernels, measured on this GPU before all else: `inferflux kernels tune` within a time limit.

The table goes into the cache folder, so that the sections after this one run with it, and into the results.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import msgspec
import torch

from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.triton import size_table
from inferflux.kernels.tune.command import demand_gpu, tune
from inferflux.kernels.tune.knobs import tasks_of

SECONDS = 110
# What the bars rest on (see `bars`). Alone first: tasks with few candidates are ready sooner and would hold the device.
FIRST = ("attention decode", "attention prefill", "linear one")
# A task that is given less is not started: it would only import torch.
LEAST_SECONDS = 15


def measure(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """Yields the table, as far as it is known, and what was found of each entry: medians of every candidate, and who
    was left out."""
    if device.type == "cpu":
        yield "table", {"skipped": "needs a GPU"}
        return
    demand_gpu()
    size = "small" if toy else "large"
    tasks = tasks_of(SHAPES[size])
    deadline = time.monotonic() + SECONDS
    is_measured = False
    for part in ([each for each in tasks if each.name in FIRST], [each for each in tasks if each.name not in FIRST]):
        seconds = deadline - time.monotonic()
        if seconds < LEAST_SECONDS:
            break
        found = tune(part, size, seconds, print)
        if not found.is_empty:
            is_measured = True
            size_table.write(found.table, size_table.path_of(found.table.gpu, found.table.triton))
        yield "table", {"ok": is_measured, **msgspec.to_builtins(found.table)}
        yield from ((name, asdict(outcome)) for name, outcome in found.outcomes.items())
