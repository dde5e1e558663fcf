"""`inferflux kernels tune`: measures the sizes of the Triton kernels on this machine's GPU and keeps what is better."""

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.markup import escape

from inferflux.command_line import positive
from inferflux.errors import InferFluxError
from inferflux.kernels.backends import OPS, find_backend
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.triton import size_table
from inferflux.kernels.triton.size_table import SizeTable
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.tune.knobs import TuningTask, tasks_of
from inferflux.kernels.tune.report import Found, as_json, merged, outcome_table, remarks
from inferflux.kernels.tune.workers import Limits, run_workers

SECONDS: Final = 180
MODEL_SIZES: Final = tuple(name for name in SHAPES if name != "toy")
WORKER: Final = ("-P", "-m", "inferflux.kernels.tune.worker")
# Processes that compile and check at once; each takes some hundreds of MB of the device.
MOST_PROCESSES: Final = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=OPS, help="only this op's sizes; may be repeated")
    parser.add_argument("--size", choices=MODEL_SIZES, default="large",
                        help="model size, as for `bench` (default: large)")  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=SECONDS, help=f"time limit (default: {SECONDS})")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write the table there (default: the user's cache, where it takes effect)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 1 when nothing could be measured or kept. Raises InferFluxError where there is no GPU to measure."""
    demand_gpu()
    tasks = [each for each in tasks_of(SHAPES[args.size]) if not args.op or set(args.op) & set(each.ops)]
    console = Console(stderr=True)
    with console.status("starting") as status:
        found = tune(tasks, args.size, args.seconds, lambda doing: status.update(escape(doing)))
    problem, path = None, args.out or size_table.path_of(found.table.gpu, found.table.triton)
    if found.is_empty:
        problem = "nothing could be measured"
    else:
        try:
            size_table.write(found.table, path)
        except OSError as error:
            problem = f"{path} cannot be written: {error.strerror or error}"
    _print(found, None if problem else path, as_data=args.json)
    if problem:
        print(f"inferflux kernels tune: {problem}", file=sys.stderr)
    return 1 if problem else 0


def demand_gpu() -> None:
    """Raises InferFluxError where Triton's kernels do not run on a GPU."""
    if not torch.cuda.is_available():
        raise InferFluxError("kernels tune: there is no CUDA device here whose sizes could be measured")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = find_backend("triton").refusal("attention", device, torch.bfloat16)
    if reason is None and _tuning().gpu_of(device).name is None:
        reason = "TRITON_INTERPRET is set"
    if reason is not None:
        raise InferFluxError(f"kernels tune: the triton kernels do not run on this GPU: {reason}")


def tune(tasks: Sequence[TuningTask], model_size: str, seconds: float, on_progress: Callable[[str], object]) -> Found:
    """Runs the tasks on the current device. The table is the cached one with what was found now."""
    tuning = _tuning()
    gpu = torch.cuda.get_device_name()
    earlier = size_table.read(gpu, tuning.__version__)
    command = [sys.executable, *WORKER]
    limits = Limits(seconds, processes=max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)))
    outcomes = asyncio.run(run_workers(tasks, model_size, command, limits, on_progress))
    knobs = [knob for task in tasks for knob in task.knobs]
    sizes = merged(earlier.sizes if earlier else Sizes(), knobs, outcomes, tuning.SHIPPED)
    date = datetime.now(UTC).date().isoformat()
    return Found(SizeTable(size_table.VERSION, gpu, tuning.__version__, date, model_size, sizes), outcomes)


def origin_of_sizes(device: torch.device) -> str | None:
    """Says where the sizes of the Triton kernels come from on a GPU; None where these do not run."""
    if device.type != "cuda" or find_backend("triton").refusal("attention", device, torch.bfloat16) is not None:
        return None
    table: SizeTable | None = _tuning().measured_on(device)
    if table is None:
        return "as shipped; `inferflux kernels tune` measures them here"
    better = ", ".join(table.entries())
    found = f"other than shipped are {better}" if better else "as shipped, which were the fastest"
    return f"measured here on {table.date} ({table.model_size}): {found}; {size_table.path_of(table.gpu, table.triton)}"


def _tuning() -> Any:
    """Imports Triton, which may not be installed."""
    return importlib.import_module("inferflux.kernels.triton.tuning")


def _print(found: Found, written: Path | None, *, as_data: bool) -> None:
    if as_data:
        print(json.dumps(as_json(found, None if written is None else str(written)), indent=1))
        return
    console = Console()
    console.print(outcome_table(found.outcomes, escape(found.table.gpu)))
    for remark in remarks(found.outcomes):
        console.print(escape(remark), soft_wrap=True)
    if written is not None:
        console.print(escape(f"written: {written}"), soft_wrap=True)
