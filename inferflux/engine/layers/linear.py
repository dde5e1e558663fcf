"""Linear: one packed matrix and the op that multiplies by it; LoraLinear: the same, and what adapters add."""

from collections.abc import Mapping

import torch

from inferflux.engine.layers.lora import LoraWeights, StepAdapters
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.native import low_rank
from inferflux.kernels.native.panels import Panels
from inferflux.kernels.native.row_table import RowTable
from inferflux.kernels.quantized_weight import QuantizedWeight
from inferflux.kernels.torch import linear as own_linear


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

    def __call__(self, x: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """adapters: the step's adapters, none of which changes this matrix."""
        return self._run(self._packed, x)

    @property
    def rows(self) -> RowTable | None:
        """The matrix's rows one by one, where its layout has them, so that nobody need keep it besides for those."""
        packed = self._packed
        is_own = isinstance(packed, own_linear.PackedWeight) and isinstance(packed.weight, Panels)
        return RowTable(packed.weight) if is_own else None


class LoraLinear(Linear):
    """A matrix that adapters add to, each to its own tokens, so that one step holds tokens of several and of none.

    lora: by the adapter's number; one that leaves this matrix alone has none. A token's result depends on its own
    adapter only.
    """

    __slots__ = ("_arranged", "_lora")

    def __init__(
        self,
        kernels: KernelSet,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None,
        lora: Mapping[int, LoraWeights],
    ) -> None:
        super().__init__(kernels, weight, bias)
        # The native library adds those of all rows in one call, which a tape can hold.
        is_native = kernels.linear is own_linear and all(low_rank.computes(one.down) for one in lora.values())
        self._arranged = low_rank.arrange(lora) if is_native else None
        self._lora = {} if is_native else lora

    def __call__(self, x: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        y = self._run(self._packed, x)
        if adapters is None:
            return y
        if self._arranged is not None:
            low_rank.add(self._arranged, y, x, adapters.numbers)
            return y
        assert adapters.groups, "nobody records what torch adds"
        for adapter, tokens in adapters.groups:
            added = self._lora.get(adapter)
            if added is None:
                continue
            if tokens is None:
                y.add_(added(x))
            else:
                y.index_add_(0, tokens, added(x.index_select(0, tokens)))
        return y
