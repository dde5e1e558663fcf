"""The result of a tuning run: the table to keep, rows for people, JSON for programs. Knows no process."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import msgspec
from rich import box
from rich.table import Table

from inferflux.kernels.triton.size_table import SizeTable
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.tune.knobs import Knob
from inferflux.kernels.tune.workers import Outcome


class Found(NamedTuple):
    """table: to be kept. outcomes: by knob."""

    table: SizeTable
    outcomes: Mapping[str, Outcome]

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all could be measured."""
        return not any(map(is_decided, self.outcomes.values()))


def is_decided(outcome: Outcome) -> bool:
    """Whether the entry was measured: timed beside others, or chosen because the current one failed."""
    return outcome.entry is not None and (bool(outcome.us) or outcome.current in outcome.left_out)


def merged(earlier: Sizes, knobs: Iterable[Knob], outcomes: Mapping[str, Outcome], shipped: Sizes) -> Sizes:
    """Returns the entries to keep: those measured now over earlier ones, but none that equals the shipped one."""
    sizes = earlier.over(shipped)
    for knob in knobs:
        outcome = outcomes[knob.name]
        if is_decided(outcome):
            known = {**knob.choices(shipped), **knob.choices(sizes)}
            sizes = knob.changed(sizes, known[str(outcome.entry)])
    tables = {each.name: (getattr(sizes, each.name), getattr(shipped, each.name)) for each in fields(sizes)}
    return Sizes(
        **{
            name: {key: entry for key, entry in ours.items() if entry != theirs.get(key)}
            for name, (ours, theirs) in tables.items()
        }
    )


def as_json(found: Found, written: str | None) -> dict[str, Any]:
    """written: the file the table is in."""
    table: dict[str, Any] = msgspec.to_builtins(found.table)
    return {**table, "written": written, "knobs": {name: asdict(each) for name, each in found.outcomes.items()}}


def outcome_table(outcomes: Mapping[str, Outcome], gpu: str) -> Table:
    table = Table(title=f"sizes of the triton kernels on {gpu}", box=box.SIMPLE_HEAD)
    for column in ("of", "shipped", "best here", "faster by"):
        table.add_column(column)
    for name, outcome in outcomes.items():
        if is_decided(outcome):
            best = "the same" if outcome.entry == outcome.current else str(outcome.entry)
            gain = "" if outcome.gain is None else f"{100 * (outcome.gain - 1):.0f} %"
            table.add_row(name, outcome.current, best, gain)
        else:
            table.add_row(name, outcome.current or "", "not measured", "")
    return table


def remarks(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Says what was left out, and why."""
    for name, outcome in outcomes.items():
        if outcome.problem is not None:
            yield f"{name}: not measured completely: {outcome.problem}"
        for entry, problem in outcome.left_out.items():
            yield f"{name}: {entry} is left out: {problem}"
