"""Linear: one packed matrix and the op that multiplies by it; AdaptedLinear: the same, and what adapters add."""

from collections.abc import Mapping

import torch

from inferflux.engine.layers.low_rank import Adapted, LowRank
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.native import low_rank
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

    def __call__(self, x: torch.Tensor, adapted: Adapted | None = None) -> torch.Tensor:
        """adapted: the step's adapters, none of which changes this matrix."""
        return self._run(self._packed, x)


class AdaptedLinear(Linear):
    """A matrix that adapters add to, each to its own tokens, so that one step holds tokens of several and of none.

    low_ranks: by the adapter's number; one that leaves this matrix alone has none. A token's result depends on its own
    adapter only.
    """

    __slots__ = ("_arranged", "_low_ranks")

    def __init__(
        self,
        kernels: KernelSet,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None,
        low_ranks: Mapping[int, LowRank],
    ) -> None:
        super().__init__(kernels, weight, bias)
        # The native library adds those of all rows in one call, which a tape can hold.
        is_native = kernels.linear is own_linear and all(low_rank.computes(one.down) for one in low_ranks.values())
        self._arranged = low_rank.arrange(low_ranks) if is_native else None
        self._low_ranks = {} if is_native else low_ranks

    def __call__(self, x: torch.Tensor, adapted: Adapted | None = None) -> torch.Tensor:
        y = self._run(self._packed, x)
        if adapted is None:
            return y
        if self._arranged is not None:
            low_rank.add(self._arranged, y, x, adapted.numbers)
            return y
        assert adapted.groups, "nobody records what torch adds"
        for adapter, tokens in adapted.groups:
            added = self._low_ranks.get(adapter)
            if added is None:
                continue
            if tokens is None:
                y.add_(added(x))
            else:
                y.index_add_(0, tokens, added(x.index_select(0, tokens)))
        return y
