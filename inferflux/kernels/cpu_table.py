"""The table of products: which layout and which way of multiplying is fastest on this machine, per matrix and rows.

A matrix of a kind and size is measured when it is first loaded, within a budget of time per process, and the choice is
kept in the user's cache, one file per machine. What is not measured yet gets the default. Knows no kernel: layouts and
methods are handed in.
"""

import functools
import hashlib
import json
import logging
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from inferflux.config.cache_dir import cache_dir
from inferflux.kernels import cpu_features

Tensor = torch.Tensor
logger = logging.getLogger(__name__)

# Numbers of rows that are measured; a product of more rows goes by the next larger one, or the last.
BUCKETS: Final = (1, 4, 16, 64, 256)
# A start may spend this long on measuring (five matrices of a 135M model take about as long); the next one goes on.
BUDGET_S: Final = 0.4
# Another choice than the default must be this much faster: timings of a shared machine differ by as much for nothing.
MARGIN: Final = 0.85
REPEATS: Final = 3
# Elements of a larger matrix that are measured: rows of it that fill this.
SAMPLE_ELEMENTS: Final = 2**22


class Method(NamedTuple):
    """run(arranged, x, bias) -> x @ weight.T + bias, for at most max_rows rows (None: any number)."""

    name: str
    run: Callable[[Any, Tensor, Tensor | None], Tensor]
    max_rows: int | None = None

    def takes(self, num_rows: int) -> bool:
        return self.max_rows is None or num_rows <= self.max_rows


class Layout(NamedTuple):
    """arrange(weight) lays a matrix out; methods multiply by it, best first where nothing is measured."""

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
    """Returns the index into BUCKETS that a product of so many rows goes by."""
    return min(bisect_left(BUCKETS, num_rows), len(BUCKETS) - 1)


class CpuTable:
    """The choices of one machine, kept in `path`. budget_s: how long this process may measure."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self._path = path
        self._budget_s = budget_s
        self._names: dict[str, list[str]] = _read(path)

    def choose(self, key: str, layouts: Sequence[Layout], sample: Callable[[int], Any], dtype: torch.dtype) -> Choice:
        """Returns how to lay out and multiply the matrix `key` names: its kind and size.

        layouts: the default first. sample(elements) returns its first rows, of about so many elements. dtype: of x.
        """
        known = _find(self._names.get(key), layouts)
        if known is not None:
            return known
        default = Choice(layouts[0], layouts[0].defaults())
        if self._budget_s <= 0 or sum(len(layout.methods) for layout in layouts) == 1:
            return default
        started = time.perf_counter()
        choice = measure(layouts, sample(SAMPLE_ELEMENTS), dtype)
        self._budget_s -= time.perf_counter() - started
        self._names[key] = choice.names
        self._write()
        return choice

    def _write(self) -> None:
        """Keeps what other processes wrote meanwhile. A cache that cannot be written is no error."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({**_read(self._path), **self._names}, indent=1, sort_keys=True))
            temporary.replace(self._path)
        except OSError as error:
            logger.debug("%s: cannot be written: %s", self._path, error)


@functools.cache
def cpu_table() -> CpuTable:
    """Returns this machine's table, as this process shares it."""
    facts = (cpu_features.description(), torch.__version__, torch.get_num_threads())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    return CpuTable(cache_dir() / f"products-{digest}.json", BUDGET_S)


def measure(layouts: Sequence[Layout], weight: Any, dtype: torch.dtype) -> Choice:
    """Times every method of every layout at every number of rows it takes, and chooses."""
    best: Choice | None = None
    least = 0.0
    for layout in layouts:
        arranged = layout.arrange(weight)
        choice, score = _measure_layout(layout, arranged, weight.shape[1], dtype)
        if best is None or score < least + len(BUCKETS) * math.log(MARGIN):
            best, least = choice, score
    assert best is not None
    return best


def _measure_layout(layout: Layout, arranged: Any, num_inputs: int, dtype: torch.dtype) -> tuple[Choice, float]:
    """Returns the layout's best methods and the sum of the logarithms of their times."""
    chosen, score = [], 0.0
    with torch.inference_mode():
        for rows, default in zip(BUCKETS, layout.defaults(), strict=True):
            x = torch.randn(rows, num_inputs).to(dtype)
            method, seconds = default, _time(default, arranged, x)
            for other in layout.methods:
                if other is not default and other.takes(rows):
                    taken = _time(other, arranged, x)
                    if taken < MARGIN * seconds:
                        method, seconds = other, taken
            chosen.append(method)
            score += math.log(seconds)
    return Choice(layout, tuple(chosen)), score


def _time(method: Method, arranged: Any, x: Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        method.run(arranged, x, None)
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _find(names: list[str] | None, layouts: Sequence[Layout]) -> Choice | None:
    """Returns what the names stand for; None when some are not known here (any more)."""
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
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: names
        for key, names in content.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }
