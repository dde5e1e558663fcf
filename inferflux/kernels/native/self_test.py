"""The self-test: checks that the library a start would load is correct, on cases and tolerances of `kernels check`.

`build` runs this file as a process, in a cache folder that holds only the new library, since a wrong one may crash. It
prints each case before it runs, so that the last line says where a crash was or what is wrong.
"""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch

from inferflux.kernels.backends import KV_OPS, find_backend
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import check_case
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.native import DTYPES, low_rank, panels
from inferflux.kernels.native.build import REFUSED, is_whole, library_path, openmp_library
from inferflux.kernels.native.loading import library

OPS: Final = ("norm", "add_norm", "activation", "rope", "attention")
# Cases whose reference takes seconds, and that cover nothing in the kernels that others do not.
TOO_LARGE: Final = ("decode, long", "head size 256", "after a cached prefix", "2100x577", "4100", "1024x1024")
# More than one, so that work is divided; few, so that a server starting at the same time is not slowed.
THREADS: Final = 2


class Subject(NamedTuple):
    """What is tested: an implementation of `op`, in `dtype`."""

    op: str
    implementation: Any
    dtype: torch.dtype


def subjects() -> Iterator[Subject]:
    """Yields everything that the library computes: its ops, and its products in floats and in integers."""
    native = find_backend("native")
    products = {"linear": _product(panels.arrange_floats), "quantized_linear": _product(panels.arrange)}
    for dtype in DTYPES:
        for op in OPS:
            yield Subject(op, native.find(op), dtype)
        for op, product in products.items():
            yield Subject(op, product, dtype)


def _product(arrange: Callable[[Any], panels.Panels]) -> SimpleNamespace:
    """Returns the panels as an op. (At run time `cpu_table` chooses among them and other layouts.)"""
    return SimpleNamespace(
        pack=lambda weight, bias: (arrange(weight), bias),
        run=lambda packed, x: panels.multiply(packed[0], x, packed[1]),
        rounds_inputs=arrange is panels.arrange,
    )


def main() -> int:
    """Returns 0, or REFUSED when the library is wrong or cannot be loaded; what is wrong is the last line printed."""
    openmp = openmp_library()
    if openmp is None or not is_whole(library_path(openmp)):
        # `library()` would start a build.
        print("it is not where a start looks for it")
        return 1
    reason = library().reason
    if reason is not None:
        print(reason)
        return REFUSED
    torch.set_num_threads(THREADS)
    for op, implementation, dtype in subjects():
        for case in (*cases_of(op), *(cases_of(op, quantized_kv=True) if op in KV_OPS else ())):
            if any(words in case.name for words in TOO_LARGE):
                continue
            where = f"{op} in {dtype_name(dtype)}, {case.name}"
            print(where, flush=True)
            result = check_case(implementation, case, dtype, torch.device("cpu"))
            if not result.ok:
                print(f"{where}: {result.problem}")
                return REFUSED
    for dtype in DTYPES:
        where = f"low ranks in {dtype_name(dtype)}"
        print(where, flush=True)
        if not adds_low_ranks(dtype):
            print(f"{where}: not what torch adds")
            return REFUSED
    return 0


def adds_low_ranks(dtype: torch.dtype) -> bool:
    """Whether rows of two adapters, of none and of an unknown one are right: with more rows than are computed at once,
    and sizes that are no multiples of anything."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, y = drawn(37, 77), drawn(37, 141)
    ranks = {1: (drawn(16, 77), drawn(141, 16)), 3: (drawn(5, 77), drawn(141, 5))}
    numbers = torch.arange(37, dtype=torch.int32) % 5
    expected = y.double()
    for row, number in enumerate(numbers.tolist()):
        if number in ranks:
            down, up = (matrix.double() for matrix in ranks[number])
            expected[row] += up @ (down @ x[row].double())
    low_rank.add(low_rank.arrange(ranks), y, x, numbers)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    # Sums of 77 products in another order than here: 1.3 was seen (AVX-512).
    return bool(error <= 4 * torch.finfo(dtype).eps)


if __name__ == "__main__":
    sys.exit(main())
