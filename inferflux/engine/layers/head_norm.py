"""Normalising queries and keys before they are rotated: each head by itself, or all heads of a token as one vector."""

from typing import Protocol

import torch

from inferflux.dist.context import ParallelContext
from inferflux.kernels.kernel_set import KernelSet

Tensor = torch.Tensor


class HeadNorm(Protocol):
    def __call__(self, heads: Tensor) -> None:
        """heads [T, H + K, D], this rank's queries and keys, a view: normalised in place."""
        ...


class PerHeadNorm:
    """weight [H + K, D]: one row per head."""

    def __init__(self, kernels: KernelSet, weight: Tensor, eps: float) -> None:
        self._norm = kernels.norm
        self._weight = weight
        self._eps = eps

    def __call__(self, heads: Tensor) -> None:
        heads.copy_(self._norm(heads, self._weight, self._eps))


class WholeNorm:
    """query [H, D], key [K, D]: this rank's part of the weights. widths: how many queries and keys a token has on all
    ranks together. copies: how many ranks have each key."""

    def __init__(
        self,
        context: ParallelContext,
        weights: tuple[Tensor, Tensor],
        widths: tuple[int, int],
        copies: int,
        eps: float,
    ) -> None:
        self._context = context
        self._weights = [weight.float() for weight in weights]
        self._widths = torch.tensor(widths, dtype=torch.float32, device=weights[0].device)
        self._shares = torch.tensor((1.0, 1.0 / copies), dtype=torch.float32, device=weights[0].device)
        self._eps = eps

    def __call__(self, heads: Tensor) -> None:
        parts = heads.split([len(weight) for weight in self._weights], dim=1)
        squares = torch.stack([part.float().square().sum(dim=(1, 2)) for part in parts], dim=1)
        means = self._context.all_reduce(squares * self._shares) / self._widths
        scales = torch.rsqrt(means + self._eps)
        for index, (part, weight) in enumerate(zip(parts, self._weights, strict=True)):
            part.copy_(part.float() * scales[:, index, None, None] * weight)
