"""Linear: one packed matrix and the op that multiplies by it."""

import torch

from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.quantized_weight import QuantizedWeight


class Linear:
    """y = x @ weight.T + bias, x [T, in] -> [T, out]. The layout in memory is the op's own."""

    __slots__ = ("_packed", "_run")

    def __init__(
        self, kernels: KernelSet, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None
    ) -> None:
        if isinstance(weight, QuantizedWeight):
            self._packed, self._run = kernels.quantized_linear.pack(weight, bias), kernels.quantized_linear.run
        else:
            self._packed, self._run = kernels.linear.pack(weight, bias), kernels.linear.run

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self._packed, x)
