"""The sizes of the Triton kernels, measured on this GPU before all else: `inferflux kernels tune` within a time limit.

The table goes into the cache folder, so that the sections after this one run with it, and into the results.
"""

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


def measure(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """Yields the table, then what was found of each entry: medians of every candidate, and who was left out."""
    if device.type == "cpu":
        yield "table", {"skipped": "needs a GPU"}
        return
    demand_gpu()
    size = "small" if toy else "large"
    found = tune(tasks_of(SHAPES[size]), size, SECONDS, print)
    if not found.is_empty:
        size_table.write(found.table, size_table.path_of(found.table.gpu, found.table.triton))
    yield "table", {"ok": not found.is_empty, **msgspec.to_builtins(found.table)}
    yield from ((name, asdict(outcome)) for name, outcome in found.outcomes.items())
