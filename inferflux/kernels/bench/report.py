"""What was measured, as rows: for people a table, for programs CSV and JSON. Knows no clock."""

import csv
import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from inferflux.kernels.bench.roofline import Roofline
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.dtypes import dtype_name


@dataclass(frozen=True, slots=True)
class Entry:
    """One backend on one workload. seconds: the median of its rounds. percent: of the roofline, the least time this
    machine needs for the bytes and operations the op cannot do without; bound says which of the two limits it."""

    op: str
    workload: str
    dtype: str
    backend: str
    seconds: float
    best_seconds: float
    gb_per_s: float
    tflop_per_s: float
    flop_per_byte: float
    percent: float
    bound: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two backends on one workload. speedup: how many times faster `first` is, the median over rounds of the two
    times taken one after the other; low, high: the quartiles."""

    op: str
    workload: str
    dtype: str
    first: str
    second: str
    speedup: float
    low: float
    high: float


def make_entry(workload: Workload, dtype: torch.dtype, backend: str, times: Sequence[float], roof: Roofline) -> Entry:
    cost = workload.cost
    num_bytes, seconds = cost.num_bytes(dtype), statistics.median(times)
    return Entry(
        op=workload.op,
        workload=workload.name,
        dtype=dtype_name(dtype),
        backend=backend,
        seconds=seconds,
        best_seconds=min(times),
        gb_per_s=num_bytes / seconds / 1e9,
        tflop_per_s=cost.flops / seconds / 1e12,
        flop_per_byte=cost.flops / num_bytes,
        percent=100 * roof.least_seconds(num_bytes, cost.flops, dtype) / seconds,
        bound=roof.bound(num_bytes, cost.flops, dtype),
    )


def make_pairs(workload: Workload, dtype: torch.dtype, times: dict[str, list[float]]) -> list[Pair]:
    """times: by backend, one per round, of the same rounds."""
    pairs = []
    for first, second in combinations(times, 2):
        ratios = [slow / fast for fast, slow in zip(times[first], times[second], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        pairs.append(Pair(workload.op, workload.name, dtype_name(dtype), first, second, middle, low, high))
    return pairs


def as_json(entries: Sequence[Entry], pairs: Sequence[Pair], roof: Roofline, settings: dict[str, Any]) -> str:
    report = {
        "environment": _environment(settings["device"]),
        "settings": settings,
        "roofline": {
            "gb_per_s": roof.bytes_per_s / 1e9,
            "tflop_per_s": {dtype_name(dtype): flops / 1e12 for dtype, flops in roof.flops_per_s.items()},
        },
        "entries": [asdict(entry) for entry in entries],
        "pairs": [asdict(pair) for pair in pairs],
    }
    return json.dumps(report, indent=1)


def write_csv(path: Path, entries: Iterable[Entry]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Entry)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in entries)


def entry_table(entries: Iterable[Entry], roof: Roofline) -> Table:
    limits = ", ".join(f"{flops / 1e12:.3g} TFLOP/s {dtype_name(dtype)}" for dtype, flops in roof.flops_per_s.items())
    table = Table(title=f"roofline here: {roof.bytes_per_s / 1e9:.3g} GB/s, {limits}", box=box.SIMPLE_HEAD)
    for column in ("op", "dtype", "backend"):
        table.add_column(column, overflow="fold")  # half a name could be another's
    for column in ("µs", "GB/s", "TFLOP/s", "% of roof"):
        table.add_column(column, justify="right")
    for entry in entries:
        figures = (f"{entry.seconds * 1e6:.4g}", f"{entry.gb_per_s:.3g}", f"{entry.tflop_per_s:.3g}")
        share = f"{entry.percent:.0f} {entry.bound}"
        table.add_row(f"{entry.op} {entry.workload}", entry.dtype, escape(entry.backend), *figures, share)
    return table


def pair_table(pairs: Iterable[Pair]) -> Table:
    table = Table(title="pair by pair, rounds in turns", box=box.SIMPLE_HEAD)
    for column in ("op", "dtype", "first", "second", "speed of first : second (quartiles)"):
        table.add_column(column, overflow="fold")
    for pair in pairs:
        ratio = f"{pair.speedup:.2f} x ({pair.low:.2f} to {pair.high:.2f})"
        table.add_row(f"{pair.op} {pair.workload}", pair.dtype, escape(pair.first), escape(pair.second), ratio)
    return table


def _environment(device: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
    }
