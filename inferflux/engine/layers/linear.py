"""Linear: one packed matrix and the op that multiplies by it."""

import torch

from inferflux.kernels.kernel_set import KernelSet


class Linear:
    """y = x @ weight.T + bias, x [T, in] -> [T, out]. The layout in memory is the op's own."""

    __slots__ = ("_packed", "_run")

    def __init__(self, kernels: KernelSet, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = kernels.linear.pack(weight, bias)
        self._run = kernels.linear.run

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self._packed, x)
