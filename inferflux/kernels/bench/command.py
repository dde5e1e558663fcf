"""`inferflux kernels bench`: times every op of every backend asked for, and writes table, CSV, JSON and plot.

A kernel that fails its check (`kernels.check`) is named and not timed.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from inferflux.command_line import positive
from inferflux.errors import ConfigError, InferFluxError
from inferflux.kernels.backends import BUILT_IN, OPS, Backend, find_backend
from inferflux.kernels.bench.measure import Contender, ContenderError, make_contender, make_sampler, take_turns
from inferflux.kernels.bench.plot import draw_plot
from inferflux.kernels.bench.report import (
    Entry,
    Pair,
    as_json,
    entry_table,
    make_entry,
    make_pairs,
    pair_table,
    write_csv,
)
from inferflux.kernels.bench.roofline import TOY_PROBE, Roofline, measure_roofline, probe_for
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import workloads_of
from inferflux.kernels.blame import describe_failure
from inferflux.kernels.check import check_op
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.options import DTYPES, add_common, device_of
from inferflux.kernels.reasons import told


class Task(NamedTuple):
    """One workload in one dtype, and the backends that take part."""

    workload: Workload
    dtype: torch.dtype
    backends: list[Backend]


class Conditions(NamedTuple):
    """size: of `SHAPES`. toy: one that only shows that everything runs, so nothing is done to make the figures true."""

    device: torch.device
    size: str
    rounds: int

    @property
    def toy(self) -> bool:
        return self.size == "toy"


class Measured(NamedTuple):
    """failures: backends that were wrong or raised, in words."""

    entries: list[Entry]
    pairs: list[Pair]
    failures: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this backend; may be repeated")
    parser.add_argument("--module", action="append", metavar="FILE", default=[],
                        help="your own kernels, too: a Python file or a module name")  # fmt: skip
    parser.add_argument("--size", choices=tuple(SHAPES), help="default: small on a CPU, large on a GPU")
    parser.add_argument("--dtype", action="append", choices=DTYPES,
                        help="default: float32 on a CPU, bfloat16 on a GPU; may be repeated")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=15, help="samples of each (default 15)")
    parser.add_argument("--out", type=Path, default=Path("kernels-bench"), metavar="FOLDER",
                        help="where bench.csv, bench.json and roofline.png go (default: kernels-bench)")  # fmt: skip
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 1 when a backend was wrong or raised. Raises ConfigError when there is nothing to measure."""
    device = device_of(args)
    conditions = Conditions(device, args.size or ("small" if device.type == "cpu" else "large"), args.rounds)
    names = args.dtype or ["float32" if device.type == "cpu" else "bfloat16"]
    dtypes = tuple(getattr(torch, name) for name in dict.fromkeys(names))
    console, measured = Console(stderr=True), Measured([], [], [])
    backends = _backends(args, device, dtypes)
    with console.status("checking the kernels"):
        tasks = list(_tasks(args.op or OPS, backends, dtypes, conditions, measured.failures))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {args.out} cannot be made: {error.strerror}") from error
    with console.status("measuring this machine's roofline"):
        needed = tuple(dict.fromkeys(task.dtype for task in tasks))
        roof = measure_roofline(device, needed, TOY_PROBE if conditions.toy else probe_for(device))
    _measure(tasks, conditions, roof, measured, console)
    settings = {"device": str(device), "size": conditions.size, "dtypes": names, "rounds": args.rounds}
    _report(args, measured, roof, settings)
    for failure in measured.failures:
        print(failure, file=sys.stderr)
    return 1 if measured.failures else 0


def _backends(args: argparse.Namespace, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[Backend]:
    """Raises ConfigError when a module serves none of the ops asked for, or nothing does."""
    asked = args.backend or [name for name in BUILT_IN if name != "reference"]
    backends = [find_backend(name) for name in dict.fromkeys([*asked, *args.module])]
    refusals: dict[str, list[tuple[str, str]]] = {}
    for backend in backends:
        reasons = [(op, backend.refusal(op, device, dtype)) for op in args.op or OPS for dtype in _dtypes(op, dtypes)]
        if all(reason is not None for _, reason in reasons):
            refusals[backend.name] = [(op, str(reason)) for op, reason in reasons]
    for name in [*args.module, *(asked if len(refusals) == len(backends) else ())]:
        if name in refusals:
            raise ConfigError(f"nothing to measure: {name}: {'; '.join(told(refusals[name]))}")
    return backends


def _dtypes(op: str, dtypes: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """Logits are float32 whatever the others are."""
    return (torch.float32,) if op == "sampling" else dtypes


def _tasks(
    ops: Iterable[str],
    backends: list[Backend],
    dtypes: tuple[torch.dtype, ...],
    conditions: Conditions,
    failures: list[str],
) -> Iterator[Task]:
    """Yields the tasks of the backends that pass their checks; appends to failures what is wrong with the others."""
    for op in ops:
        for dtype in _dtypes(op, dtypes):
            serving = [backend for backend in backends if backend.refusal(op, conditions.device, dtype) is None]
            if not conditions.toy:
                serving = list(_right(serving, op, dtype, conditions.device, failures))
            if serving:
                yield from (Task(workload, dtype, serving) for workload in workloads_of(op, SHAPES[conditions.size]))


def _right(
    backends: Iterable[Backend], op: str, dtype: torch.dtype, device: torch.device, failures: list[str]
) -> Iterator[Backend]:
    for backend in backends:
        wrong = next((result for result in check_op(backend.find(op), op, dtype, device) if not result.ok), None)
        if wrong is None:
            yield backend
        else:
            where = f"{backend.name} {op} {dtype_name(dtype)}"
            failures.append(f"{where}: not timed, as it fails its check: {wrong.case}: {wrong.problem}")


def _measure(tasks: list[Task], conditions: Conditions, roof: Roofline, measured: Measured, console: Console) -> None:
    with Progress(console=console, transient=True) as progress, torch.inference_mode():
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=f"{task.workload.op} {task.workload.name} {dtype_name(task.dtype)}")
            _measure_task(task, conditions, roof, measured)
            progress.advance(bar)


def _measure_task(task: Task, conditions: Conditions, roof: Roofline, measured: Measured) -> None:
    """Who fails is out, and the others are measured."""
    workload, dtype, device = task.workload, task.dtype, conditions.device
    contenders: list[Contender] = []

    def note(name: str, error: BaseException) -> None:
        where = f"{name} {workload.op} {workload.name} {dtype_name(dtype)}"
        measured.failures.append(f"{where}: {describe_failure(error, workload.op)}")

    for backend in task.backends:
        try:
            contenders.append(make_contender(backend.name, backend.find(workload.op), workload, dtype, device))
        except Exception as error:
            note(backend.name, error)
    sampler, times = make_sampler(workload, device, toy=conditions.toy), None
    while times is None:
        try:
            times = take_turns(contenders, sampler, conditions.rounds)
        except ContenderError as failure:
            note(failure.contender.name, failure.reason)
            contenders.remove(failure.contender)
    by_name = {contender.name: own for contender, own in zip(contenders, times, strict=True)}
    measured.entries.extend(make_entry(workload, dtype, name, own, roof) for name, own in by_name.items())
    measured.pairs.extend(make_pairs(workload, dtype, by_name))


def _report(args: argparse.Namespace, measured: Measured, roof: Roofline, settings: dict[str, Any]) -> None:
    """Prints what was measured, and only then writes it: a full disk takes none of it away."""
    text, console = as_json(measured.entries, measured.pairs, roof, settings), Console()
    if args.json:
        print(text)
    else:
        console.print(entry_table(measured.entries, roof))
        if measured.pairs:
            console.print(pair_table(measured.pairs))
    written = _write(args.out, text, measured, roof)
    if not args.json:
        console.print(escape(f"written: {', '.join(map(str, written))}"), soft_wrap=True)


def _write(folder: Path, text: str, measured: Measured, roof: Roofline) -> list[Path]:
    """Returns the files. Raises InferFluxError when one cannot be written."""
    table, record, plot = (folder / name for name in ("bench.csv", "bench.json", "roofline.png"))
    try:
        write_csv(table, measured.entries)
        record.write_text(text + "\n")
        draw_plot(plot, measured.entries, roof)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return [table, record]
    except OSError as error:
        raise InferFluxError(f"--out: {folder} cannot be written: {error.strerror}") from error
    return [table, record, plot]
