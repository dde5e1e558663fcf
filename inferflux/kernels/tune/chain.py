"""Kernels of a decode step one behind the other, as a recording replays them: on these is measured how they start.

Each reads what the one before has written, so that one that does not wait for it gives itself away.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch

from inferflux.kernels.backends import find_backend
from inferflux.kernels.bench.shapes import LayerShape
from inferflux.kernels.bench.workload import Cost, Workload
from inferflux.kernels.cases.case import Inputs
from inferflux.kernels.triton.sizes import Launch, Sizes

# Stands for an op where a workload names one.
CHAIN: Final = "chain"
# The norms of as many layers.
LAYERS: Final = 16


class Chain:
    """Recorded when it is first called: each has arguments of its own, the same at every call."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._replay: Callable[[], object] | None = None

    def __call__(self, *arguments: Any) -> None:
        if self._replay is None:
            self._replay = self._recorded(arguments)
        self._replay()

    def _recorded(self, arguments: tuple[Any, ...]) -> Callable[[], object]:
        """Raises ArithmeticError where its results are not those of kernels that start one after another's end."""
        one_by_one = replace(self._sizes, launches={"all": Launch(early=0)})
        expected = run_chain(one_by_one, *arguments)
        actual = run_chain(self._sizes, *arguments)
        if arguments[0].device.type != "cuda":
            return lambda: run_chain(self._sizes, *arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = run_chain(self._sizes, *arguments)
        for _ in range(20):
            graph.replay()
            if not torch.equal(actual, expected):
                raise ArithmeticError("a kernel did not wait for the one before it")
        return graph.replay


def run_chain(sizes: Sizes, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the last residual."""
    triton = find_backend("triton")
    norm, add_norm = triton.find("norm"), triton.find("add_norm")
    for _ in range(LAYERS):
        x, residual = add_norm(x, residual, weight, eps, sizes=sizes)
        x = norm(x, weight, eps, sizes=sizes)
    total: torch.Tensor = add_norm(x, residual, weight, eps, sizes=sizes)[1]
    return total


def chain_workload(shape: LayerShape) -> Workload:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        rows = (torch.empty(1, shape.hidden, dtype=dtype, device=device).normal_() for _ in range(2))
        return Inputs((*rows, torch.ones(shape.hidden, dtype=dtype, device=device), 1e-5))

    num_kernels = 2 * LAYERS + 1
    return Workload(CHAIN, f"of {num_kernels} norms", Cost(num_kernels * 2 * shape.hidden, 0), False, build)
