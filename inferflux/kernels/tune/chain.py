"""A decode step's layers for one row, but for attention, one kernel behind the other as a recording replays them: on
these is measured how kernels start.

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
# All of the same weights: those of Llama-3-8B's layer are larger than any cache.
LAYERS: Final = 4
# How often it is replayed for its results. The vendor's products may differ in their last bits.
REPLAYS: Final = 20
TOLERANCE: Final = 1e-2


class Chain:
    """Recorded when it is first called: its arguments are the same at every call."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._replay: Callable[[], object] | None = None

    def __call__(self, *arguments: Any) -> None:
        if self._replay is None:
            self._replay = self._recorded(arguments)
        self._replay()

    def _recorded(self, arguments: tuple[Any, ...]) -> Callable[[], object]:
        """Raises ArithmeticError where its results are not those of kernels that start one after another's end."""
        run_chain(self._sizes, *arguments)
        if arguments[0].device.type != "cuda":
            return lambda: run_chain(self._sizes, *arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = run_chain(self._sizes, *arguments)
        one_by_one = replace(self._sizes, launches={"all": Launch(early=0)})
        x = arguments[0]
        # In turns, since what the same row has left in memory would be right.
        rows = (x.clone(), -x.flip(-1))
        results = []
        for row in rows:
            x.copy_(row)
            results.append(run_chain(one_by_one, *arguments))
        for turn in range(REPLAYS):
            x.copy_(rows[turn % 2])
            graph.replay()
            error = (actual - results[turn % 2]).abs().max() / results[turn % 2].abs().max()
            if not float(error) <= TOLERANCE:
                raise ArithmeticError("a kernel did not wait for the one before it")
        x.copy_(rows[0])
        return graph.replay


def run_chain(
    sizes: Sizes,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    matrices: dict[str, torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """Returns the last residual. In the place of attention stand its queries."""
    triton = find_backend("triton")
    add_norm, activation, linear = (triton.find(op) for op in ("add_norm", "activation", "linear"))

    def product(name: str, rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = linear.run(linear.pack(matrices[name], None), rows, sizes=sizes)
        return y

    for _ in range(LAYERS):
        x, residual = add_norm(x, residual, weight, eps, sizes=sizes)
        attended = product("qkv", x)[:, : matrices["out"].shape[1]]
        x, residual = add_norm(product("out", attended), residual, weight, eps, sizes=sizes)
        x = product("down", activation(product("gate_up", x), "silu", sizes=sizes))
    total: torch.Tensor = add_norm(x, residual, weight, eps, sizes=sizes)[1]
    return total


def chain_workload(shape: LayerShape) -> Workload:
    sizes = shape.matrices()

    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        def normal(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(std=size[1] ** -0.5)

        x, residual = normal(1, shape.hidden), normal(1, shape.hidden)
        matrices = {name: normal(*size) for name, size in sizes.items()}
        return Inputs((x, residual, torch.ones(shape.hidden, dtype=dtype, device=device), matrices, 1e-5))

    elements = LAYERS * sum(rows * columns for rows, columns in sizes.values())
    return Workload(CHAIN, f"of {LAYERS} layers", Cost(elements, 2 * elements), True, build)
