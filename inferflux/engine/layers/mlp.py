"""GatedMlp: the feed-forward half of a layer (Shazeer 2020, arXiv 2002.05202)."""

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.linear import Linear
from inferflux.engine.layers.lora import StepAdapters
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.ops import ActivationKind


class GatedMlp:
    """down(kind(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(
        self, kernels: KernelSet, context: ParallelContext, kind: ActivationKind, gate_up: Linear, down: Linear
    ) -> None:
        self._activation = kernels.activation
        self._context = context
        self._kind = kind
        self._gate_up = gate_up
        self._down = down

    def __call__(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """hidden [T, hidden] -> [T, hidden]."""
        gated = self._activation(self._gate_up(hidden, adapters), self._kind)
        return self._context.all_reduce(self._down(gated, adapters))
