"""`inferflux kernels list` and `inferflux kernels check`: what computes here, and whether it computes rightly.

`inferflux kernels bench`, how fast, is in `bench`; `inferflux kernels tune`, how to be faster, in `tune`.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inferflux.errors import ConfigError
from inferflux.kernels.backends import BUILT_IN, KV_OPS, OPS, Backend, find_backend, installed_names
from inferflux.kernels.bench import command as bench
from inferflux.kernels.check import Result, check_op, dtypes_of
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.kernel_set import Choice, select
from inferflux.kernels.native.loading import build_now
from inferflux.kernels.native.portable import FOLDER, build_portable
from inferflux.kernels.options import DTYPES, add_common, device_of
from inferflux.kernels.reasons import told
from inferflux.kernels.tune import command as tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|check|bench|tune|build")
    listing = actions.add_parser("list", help="show each op's backends and which one is used here")
    listing.add_argument("--dtype", choices=DTYPES, default="float32", help="type to compute in (default: float32)")
    add_common(listing)
    listing.set_defaults(run=_list)
    check = actions.add_parser("check", help="compare kernels with the reference; exit 1 if one differs")
    check.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    check.add_argument("--backend", action="append", metavar="NAME", help="only this backend; may be repeated")
    check.add_argument("--module", action="append", metavar="FILE", default=[],
                       help="only your own kernels: a Python file or a module name; may be repeated")  # fmt: skip
    check.add_argument("--dtype", action="append", choices=DTYPES, help="only this type; may be repeated")
    add_common(check)
    check.set_defaults(run=_check)
    bench.add_arguments(
        actions.add_parser("bench", help="benchmark kernels against each other and this machine's limits")
    )
    tune.add_arguments(actions.add_parser("tune", help="tune the triton kernels' sizes for this GPU"))
    build = actions.add_parser("build", help="compile and test the native CPU kernels now, not in the background")
    build.add_argument("--portable", action="store_true", help="for all CPU levels, into the package (for images)")
    build.set_defaults(run=_build)


def run(args: argparse.Namespace) -> int:
    """Returns 1 when a check or the build failed. Raises ConfigError when a backend cannot be found."""
    code: int = args.run(args)
    return code


def _build(args: argparse.Namespace) -> int:
    if args.portable:
        reasons = build_portable()
        for name, reason in reasons.items():
            print(f"native kernels for {name}: {FOLDER if reason is None else f'cannot be built: {reason}'}")
        return 1 if any(reasons.values()) else 0
    path, reason = build_now()
    print(f"native kernels: {path}" if reason is None else f"native kernels cannot be built: {reason}")
    return 0 if reason is None else 1


class Listed(NamedTuple):
    """One op: what was selected for it, and the state of every backend by name."""

    choice: Choice
    states: dict[str, str]


def _list(args: argparse.Namespace) -> int:
    device, dtype = device_of(args), getattr(torch, args.dtype)
    ops = {choice.op: _listed(choice, device, dtype) for choice in select(device, dtype).choices}
    # The same ops on pages of 8 bits.
    quantized = {
        choice.op: _listed(choice, device, dtype, quantized_kv=True)
        for choice in select(device, dtype, quantized_kv=True).choices
        if choice.op in KV_OPS
    }
    origin = tune.origin_of_sizes(device)
    if args.json:
        items = [
            _as_json(each) | ({"quantized_kv": _as_json(quantized[op])} if op in quantized else {})
            for op, each in ops.items()
        ]
        listing = {"device": str(device), "dtype": args.dtype, "ops": items}
        print(json.dumps(listing | ({} if origin is None else {"sizes": origin}), indent=2))
        return 0
    rows = {op: each.states for op, each in ops.items()} | {
        _on_quantized(op): each.states for op, each in quantized.items()
    }
    _print_states(rows, f"kernels on {device} in {args.dtype}, best first")
    if origin is not None:
        Console().print(escape(f"sizes of the triton kernels: {origin}"), soft_wrap=True)
    return 0


def _on_quantized(op: str) -> str:
    return f"{op} on 8-bit pages"


def _print_states(states: dict[str, dict[str, str]], title: str) -> None:
    """The table says who serves; below it stands why others do not, each reason once."""
    table = Table(title=title)
    table.add_column("op", no_wrap=True)
    for column in _backend_names():
        table.add_column(column)
    refused: dict[str, list[tuple[str, str]]] = {}
    for op, row in states.items():
        table.add_row(op, *(state.partition(":")[0] for state in row.values()))
        for name, state in row.items():
            word, _, reason = state.partition(": ")
            if word == "refused":
                refused.setdefault(name, []).append((op, reason))
    console = Console()
    console.print(table)
    for name, refusals in refused.items():
        for reason in told(refusals):
            console.print(escape(f"{name} refused: {reason}"), soft_wrap=True)


def _backend_names() -> tuple[str, ...]:
    """The built-in ones, then those that other packages brought, which must be asked for."""
    return (*BUILT_IN, *installed_names())


def _listed(choice: Choice, device: torch.device, dtype: torch.dtype, *, quantized_kv: bool = False) -> Listed:
    states = {}
    for name in _backend_names():
        try:
            reason = find_backend(name).refusal(choice.op, device, dtype, quantized_kv=quantized_kv)
        except ConfigError as error:
            reason = str(error)  # another package's, which is no reason to be silent about all others
        states[name] = f"refused: {reason}" if reason else "selected" if name == choice.backend else "available"
    return Listed(choice, states)


def _as_json(listed: Listed) -> dict[str, Any]:
    return {
        "op": listed.choice.op,
        "selected": listed.choice.backend,
        "refused": [{"backend": name, "reason": reason} for name, reason in listed.choice.refused],
        "backends": listed.states,
    }


class Line(NamedTuple):
    """One op of one backend in one dtype. skipped: why it was not checked. quantized_kv: with pages of 8 bits."""

    backend: str
    op: str
    dtype: torch.dtype
    results: tuple[Result, ...]
    skipped: str | None = None
    quantized_kv: bool = False

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.ok]


def _check(args: argparse.Namespace) -> int:
    lines = list(_run_checks(args, device_of(args)))
    checked = {line.backend for line in lines if line.results}
    for name in [*args.module, *(line.backend for line in lines if not checked)]:
        if name not in checked:
            reasons = told((line.op, str(line.skipped)) for line in lines if line.backend == name)
            raise ConfigError(f"nothing to check: {name}: {'; '.join(reasons)}")
    if args.json:
        print(json.dumps([_result_json(line, result) for line in lines for result in line.results], indent=2))
    else:
        _print_lines(lines, asked=bool(args.op))
    return 1 if any(line.failures for line in lines) else 0


def _run_checks(args: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    named = dict.fromkeys([*(args.backend or ()), *args.module])
    for backend in map(find_backend, named or [name for name in BUILT_IN if name != "reference"]):
        for op in args.op or OPS:
            dtypes = dtypes_of(op)
            if args.dtype and op != "sampling":
                dtypes = tuple(getattr(torch, name) for name in args.dtype)
            for dtype in dtypes:
                line = _run_line(backend, op, dtype, device)
                yield line
                if op in KV_OPS and line.skipped is None:
                    yield _run_line(backend, op, dtype, device, quantized_kv=True)


def _run_line(
    backend: Backend, op: str, dtype: torch.dtype, device: torch.device, *, quantized_kv: bool = False
) -> Line:
    reason = backend.refusal(op, device, dtype, quantized_kv=quantized_kv)
    if reason is not None:
        return Line(backend.name, op, dtype, (), reason, quantized_kv=quantized_kv)
    implementation = backend.find(op)
    results = tuple(check_op(implementation, op, dtype, device, quantized_kv=quantized_kv))
    return Line(backend.name, op, dtype, results, quantized_kv=quantized_kv)


def _result_json(line: Line, result: Result) -> dict[str, Any]:
    error = result.error if math.isfinite(result.error) else None
    fields = dataclasses.asdict(result) | {"dtype": dtype_name(result.dtype), "error": error}
    return {"backend": line.backend, **fields, "ok": result.ok}


def _print_lines(lines: list[Line], *, asked: bool) -> None:
    """asked: somebody named the ops, and is told which of them were not checked."""
    table = Table(title="against the reference in float64", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("backend", "op", "dtype", "cases", "error", "allowed", ""):
        table.add_column(column, no_wrap=column != "backend", overflow="fold")  # half a name could be another's
    for line in (line for line in lines if line.results):
        error, allowed = (max(getattr(result, name) for result in line.results) for name in ("error", "allowed"))
        verdict = f"[red]{len(line.failures)} failed[/red]" if line.failures else "[green]ok[/green]"
        numbers = (str(len(line.results)), f"{error:.1e}", f"{allowed:.1e}")
        op = _on_quantized(line.op) if line.quantized_kv else line.op
        table.add_row(escape(line.backend), op, dtype_name(line.dtype), *numbers, verdict)
    console = Console()
    console.print(table)
    skipped = dict.fromkeys(f"{line.backend} {line.op}: {line.skipped}" for line in lines if line.skipped)
    for each in skipped if asked else ():
        console.print(escape(f"not checked: {each}"), soft_wrap=True)
    for line in lines:
        for problem, cases in _by_problem(line.failures).items():
            others = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
            where = f"{line.backend} {line.op} {dtype_name(line.dtype)}, {cases[0]}{others}"
            console.print(escape(f"{where}: {problem}"), soft_wrap=True)


def _by_problem(failures: list[Result]) -> dict[str | None, list[str]]:
    """The cases in which each was met: what cannot be called at all need not be told for every one."""
    cases: dict[str | None, list[str]] = {}
    for result in failures:
        cases.setdefault(result.problem, []).append(result.case)
    return cases
