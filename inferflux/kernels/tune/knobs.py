"""Knobs: each is one entry of the tables of sizes, with the candidates for it, their checks and their workloads.

Knows no clock and no process.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import torch

from inferflux.kernels.bench.shapes import LayerShape, Span
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import NUM_LAYERS, workloads_of
from inferflux.kernels.cases import cases_of
from inferflux.kernels.cases.case import Case, Draw, Inputs
from inferflux.kernels.cases.paged import Paging, attention_case
from inferflux.kernels.quantized_kv import LARGEST_CODE
from inferflux.kernels.triton import candidates
from inferflux.kernels.triton.sizes import EXPERTS, HEAD_DIMS, MOST_ROWS, SCHEMES, Sizes
from inferflux.kernels.tune.chain import chain_workload

# Rows on both sides of the edges of splits and pages; the last one has several splits at any length that is tried.
_DECODES: Final = ((0, 1), (15, 16), (299, 300), (1023, 1024), (1024, 1025), (19999, 20000))
_PREFILLS: Final = ((0, 5), (64, 333), (30, 31), (200, 700))
# Rows of the checks: enough to reach across a tile of every size; the timed workloads run the same code.
_CHECKED_ROWS: Final = (1, 70)
# Ops whose kernels may start early (see `triton.start`), besides decode attention.
_EARLY_OPS: Final = ("norm", "add_norm", "rope", "activation", "quantized_linear")
# Of one split, of several with and without a window: both kernels of decode attention.
_EARLY_DECODES: Final = ("decode one row", "decode, long", "decode, long, window, soft cap")
# Cases of `linear` with sizes that no block divides, and with strided rows and weights.
_ODD_PRODUCTS: Final = ("1000x577, 1 rows", "1000x577, 3 rows", "64x48, 2 rows", "lie apart")
# Rows on which `few` and `some` are timed; `many`: those of the layer's largest step.
_ROWS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType({"few": (1, 16), "some": (64,)})
_LETTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "block_m": "m",
        "block_n": "n",
        "block_k": "k",
        "num_warps": "w",
        "num_stages": "s",
        "pages_ahead": "ahead ",
        "registers": "r",
        "tokens": "split ",
        "last_merges": "last ",
    }
)


@dataclass(frozen=True)
class Knob:
    """The entry `key` of the table `table` (see `Sizes`); of products its `part`: few, some or many rows.

    entries: candidates besides the current entry. cases: checked with each candidate; final_cases: with the fastest.
    """

    table: str
    key: int | str
    entries: tuple[Any, ...]
    workloads: tuple[Workload, ...]
    cases: tuple[Case, ...]
    final_cases: tuple[Case, ...] = ()
    part: str | None = None

    @property
    def name(self) -> str:
        return f"{self.table} {self.key}" + (f", {self.part} rows" if self.part else "")

    def current(self, sizes: Sizes) -> Any:
        """Returns the entry that these sizes have, None if the table has none."""
        entry = getattr(sizes, self.table).get(self.key)
        return getattr(entry, self.part) if self.part else entry

    def changed(self, sizes: Sizes, entry: Any) -> Sizes:
        """Returns the sizes with this entry."""
        table = getattr(sizes, self.table)
        whole = replace(table[self.key], **{self.part: entry}) if self.part else entry
        others = {key: each for key, each in table.items() if key != self.key}
        return replace(sizes, **{self.table: others if whole is None else {**others, self.key: whole}})

    def choices(self, sizes: Sizes) -> dict[str, Any]:
        """Returns the candidates by name, the current entry first."""
        entries = dict.fromkeys((self.current(sizes), *self.entries))
        return {describe(entry): entry for entry in entries}


@dataclass(frozen=True)
class TuningTask:
    """What one process measures: knobs of `ops`, each with the sizes that were chosen for the ones before it."""

    name: str
    ops: tuple[str, ...]
    knobs: tuple[Knob, ...]


def describe(entry: Any) -> str:
    """Returns a short name, such as `m128 n64 w4 s4 ahead 0`."""
    if entry is None:
        return "the vendor's library"
    return " ".join(
        describe(value) if is_dataclass(value) else f"{_LETTERS.get(name, name + ' ')}{value}"
        for name, value in vars(entry).items()
    )


def tasks_of(shape: LayerShape) -> tuple[TuningTask, ...]:
    """Returns the tasks for a layer's shape, the most important first."""
    return (
        *_attention(shape),
        *_linear(shape),
        *_products(shape),
        _blocks("sampling", shape),
        _blocks("norm", shape, "norm", "add_norm"),
        _blocks("rope", shape),
        _blocks("activation", shape),
        *_experts(shape),
    )


def _attention(shape: LayerShape) -> Iterator[TuningTask]:
    size = next(size for size in HEAD_DIMS if shape.head_dim <= size)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    workloads = workloads_of("attention", shape)
    tables: tuple[tuple[str, Mapping[int, tuple[Any, ...]], tuple[Span, ...]], ...] = (
        ("decode", candidates.DECODE, _DECODES),
        ("prefill", candidates.PREFILL, _PREFILLS),
    )
    for table, tried, spans in tables:
        paging = Paging(spans, num_layers=NUM_LAYERS)
        cases = (attention_case(table, paging, heads),)
        # Variants that need other registers and shared memory than the plain kernel.
        final_cases = (
            attention_case(f"{table}, window, soft cap", paging, heads, window=700, soft_cap=3.0),
            *(attention_case(f"{table}, {kind} pages", paging, heads, quantized_as=kind) for kind in LARGEST_CODE),
        )
        timed = tuple(each for each in workloads if each.name.startswith(table))
        knob = Knob(table, size, tried.get(size, ()), timed, cases, final_cases)
        yield TuningTask(f"attention {table}", ("attention",), (knob,))


def _linear(shape: LayerShape) -> Iterator[TuningTask]:
    odd = tuple(case for case in cases_of("linear") if any(name in case.name for name in _ODD_PRODUCTS))
    for rows, counts in (("one", (1,)), ("few", (2, MOST_ROWS))):
        knobs = []
        for kind, names in (("tall", ("qkv", "gate_up")), ("wide", ("out", "down"))):
            workloads = tuple(
                each
                for each in workloads_of("linear", replace(shape, batches=counts))
                if each.name.partition(" ")[0] in names
            )
            cases = tuple(Case("linear", each.name, _drawn(each)) for each in workloads)
            key = f"{rows} {kind}"
            knobs.append(Knob("linear", key, candidates.LINEAR[key], workloads, cases, odd))
        if rows == "one":
            # Products that start early read their weights while the kernel before them runs.
            knobs.append(_launches(shape))
        yield TuningTask(f"linear {rows}", ("linear",), tuple(knobs))


def _launches(shape: LayerShape) -> Knob:
    cases = [case for op in _EARLY_OPS for case in cases_of(op)[:2]]
    # They differ in how they begin alone. All 19 took so long to compile that an early start might not be reached.
    cases += [case for case in cases_of("attention") if case.name in _EARLY_DECODES]
    return Knob("launches", "all", candidates.LAUNCHES, (chain_workload(shape),), tuple(cases))


def _products(shape: LayerShape) -> Iterator[TuningTask]:
    for scheme in SCHEMES:
        knobs = []
        for part, entries in candidates.PRODUCTS.items():
            rows = _ROWS.get(part, shape.batches[-1:])
            cases = _cases("quantized_linear", shape, tuple(min(count, 200) for count in rows), scheme)
            workloads = _workloads("quantized_linear", shape, rows, scheme)
            knobs.append(Knob("products", scheme, entries, workloads, cases, part=part))
        yield TuningTask(f"quantized_linear {scheme}", ("quantized_linear",), tuple(knobs))


def _experts(shape: LayerShape) -> Iterator[TuningTask]:
    for kind in EXPERTS:
        op, scheme = ("moe", "") if kind == "floats" else ("quantized_moe", kind)
        cases = _cases(op, shape, _CHECKED_ROWS, scheme)
        knob = Knob("experts", kind, candidates.EXPERTS, _workloads(op, shape, shape.batches, scheme), cases)
        yield TuningTask(f"{op} {scheme}".strip(), (op,), (knob,))


def _blocks(key: str, shape: LayerShape, *ops: str) -> TuningTask:
    ops = ops or (key,)
    workloads = tuple(each for op in ops for each in workloads_of(op, shape))
    cases = tuple(case for op in ops for case in _cases(op, shape, _CHECKED_ROWS))
    return TuningTask(key, ops, (Knob("blocks", key, candidates.BLOCKS[key], workloads, cases),))


def _workloads(op: str, shape: LayerShape, rows: tuple[int, ...], scheme: str = "") -> tuple[Workload, ...]:
    named = workloads_of(op, replace(shape, batches=rows))
    return tuple(workload for workload in named if workload.name.startswith(scheme))


def _cases(op: str, shape: LayerShape, rows: tuple[int, ...], scheme: str = "") -> tuple[Case, ...]:
    return tuple(Case(op, each.name, _drawn(each)) for each in _workloads(op, shape, rows, scheme))


def _drawn(workload: Workload) -> Callable[[Draw], Inputs]:
    """Returns a builder of the workload's inputs that draws the same numbers each time, as cases do."""

    def build(draw: Draw) -> Inputs:
        torch.manual_seed(0)
        return workload.build(draw.dtype, draw.device)

    return build
