"""CpuTable: the fastest layout and product method on this machine, per matrix and number of rows.

Each kind and size of matrix is measured when it is first loaded, within a time budget per process, and the choice is
kept in the user's cache, one file per machine. Until then the default serves. Knows no kernel: layouts and methods are
passed in.
"""

import functools
import hashlib
import json
import logging
import math
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from inferflux.config.process_env import cache_dir
from inferflux.kernels import cpu_features

Tensor = torch.Tensor
logger = logging.getLogger(__name__)

# Format of the files; other versions are ignored.
VERSION: Final = 8
# Numbers of rows that are measured; other products use the next larger one, or the last.
BUCKETS: Final = (1, 4, 16, 64, 256)
# How long a start may spend on measuring (about what five matrices of a 135M model take); the next start goes on.
BUDGET_S: Final = 0.4
# A choice other than the default must take at most this share of its time: timings on a shared machine vary by as much.
MARGIN: Final = 0.85
# Each method takes at least two turns, and more while they are quick, so that a preempted turn does not count.
MOST_TURNS: Final = 12
TURNS_S: Final = 0.02
# In a decode step of at most DECODE_ROWS rows a call from Python costs this much more than here, where its code stays
# in the caches (one core of a Zen 3 EPYC: 30 us instead of 5).
DECODE_ROWS: Final = 64
CALL_S: Final = 25e-6
# Of a larger matrix only the first rows, with about this many elements, are measured.
SAMPLE_ELEMENTS: Final = 2**21


class Method(NamedTuple):
    """run(arranged, x, bias) -> x @ weight.T + bias, for at most max_rows rows (None: any number).

    on_tape: decode steps need no Python for it (see `native.tape`).
    """

    name: str
    run: Callable[[Any, Tensor, Tensor | None], Tensor]
    max_rows: int | None = None
    on_tape: bool = False

    def takes(self, num_rows: int) -> bool:
        return self.max_rows is None or num_rows <= self.max_rows


class Layout(NamedTuple):
    """arrange(weight) returns the matrix in this layout; methods multiply by it, the default first."""

    name: str
    arrange: Callable[[Any], Any]
    methods: tuple[Method, ...]

    def defaults(self) -> tuple[Method, ...]:
        return tuple(next(method for method in self.methods if method.takes(rows)) for rows in BUCKETS)


class Choice(NamedTuple):
    """methods: one per bucket."""

    layout: Layout
    methods: tuple[Method, ...]

    @property
    def names(self) -> list[str]:
        return [self.layout.name, *(method.name for method in self.methods)]


def bucket_of(num_rows: int) -> int:
    """Returns the index into BUCKETS for a product of num_rows rows."""
    return min(bisect_left(BUCKETS, num_rows), len(BUCKETS) - 1)


class CpuTable:
    """The choices of one machine, kept in `path`. budget_s: how long this process may measure."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self._path = path
        self._budget_s = budget_s
        self._names: dict[str, list[str]] = _read(path)

    def choose(
        self,
        key: str,
        layouts: Sequence[Layout],
        num_outputs: int,
        sample: Callable[[int], Any],
        dtype: torch.dtype,
    ) -> Choice:
        """Returns how to lay out and multiply the matrix of num_outputs rows `key` names: its kind and size.

        layouts: the default first. sample(elements) returns its first rows, of about so many elements. dtype: of x.
        """
        # A choice made while the native library was not built yet does not hold once it is.
        key = f"{key} by {', '.join(layout.name for layout in layouts)}"
        known = _find(self._names.get(key), layouts)
        if known is not None:
            return known
        default = Choice(layouts[0], layouts[0].defaults())
        if self._budget_s <= 0 or sum(len(layout.methods) for layout in layouts) == 1:
            return default
        started = time.perf_counter()
        weight = sample(SAMPLE_ELEMENTS)
        choice = measure(layouts, weight, dtype, CALL_S * weight.shape[0] / num_outputs)
        self._budget_s -= time.perf_counter() - started
        self._names[key] = choice.names
        self._write()
        return choice

    def _write(self) -> None:
        """Merges with what other processes wrote meanwhile. A cache that cannot be written is no error."""
        temporary = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                temporary.write_text(json.dumps({**_read(self._path), **self._names}, indent=1, sort_keys=True))
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s: cannot be written: %s", self._path, error)


@functools.cache
def cpu_table() -> CpuTable:
    """Returns this machine's table, one per process."""
    facts = (VERSION, cpu_features.description(), torch.__version__, torch.get_num_threads())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    return CpuTable(cache_dir() / f"products-{digest}.json", BUDGET_S)


def measure(layouts: Sequence[Layout], weight: Any, dtype: torch.dtype, call_s: float) -> Choice:
    """Times every method of every layout at every number of rows it supports, and chooses.

    A layout is judged by the sum of the logarithms of its best methods' times, including the call_s that Python adds
    in a decode step.
    """
    arranged = [layout.arrange(weight) for layout in layouts]
    methods: list[list[Method]] = [[] for _ in layouts]
    scores = [0.0] * len(layouts)
    with torch.inference_mode():
        for bucket, rows in enumerate(BUCKETS):
            x = torch.randn(rows, weight.shape[1]).to(dtype)
            ways = [(i, m) for i, layout in enumerate(layouts) for m in layout.methods if m.takes(rows)]
            times = _time_in_turns([functools.partial(method.run, arranged[i], x, None) for i, method in ways])
            times = [
                t if m.on_tape or rows > DECODE_ROWS else t + call_s for (_, m), t in zip(ways, times, strict=True)
            ]
            for i, layout in enumerate(layouts):
                own = {method: seconds for (j, method), seconds in zip(ways, times, strict=True) if i == j}
                best = _best(layout.defaults()[bucket], own)
                methods[i].append(best)
                scores[i] += math.log(own[best])
    margin = len(BUCKETS) * math.log(MARGIN)
    chosen = min(range(len(layouts)), key=lambda i: scores[i] + (0.0 if i else margin))
    return Choice(layouts[chosen], tuple(methods[chosen]))


def _best(default: Method, times: dict[Method, float]) -> Method:
    fastest = min(times, key=lambda method: times[method])
    return fastest if times[fastest] < MARGIN * times[default] else default


def _time_in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Returns each call's least seconds. They take turns, so that other load on the machine affects all alike."""
    least = [math.inf] * len(calls)
    begun = time.perf_counter()
    for turn in range(MOST_TURNS):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            call()
            least[index] = min(least[index], max(time.perf_counter() - started, 1e-9))
        if turn and time.perf_counter() - begun > TURNS_S:
            break
    return least


def _find(names: list[str] | None, layouts: Sequence[Layout]) -> Choice | None:
    """Returns the choice with these names; None if some do not exist (any more)."""
    if names is None or len(names) != 1 + len(BUCKETS):
        return None
    for layout in layouts:
        methods = {method.name: method for method in layout.methods}
        if layout.name == names[0] and all(name in methods for name in names[1:]):
            chosen = tuple(methods[name] for name in names[1:])
            if all(method.takes(rows) for method, rows in zip(chosen, BUCKETS, strict=True)):
                return Choice(layout, chosen)
    return None


def _read(path: Path) -> dict[str, list[str]]:
    """A file that is missing, damaged or of another shape is an empty table."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: names
        for key, names in content.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }
