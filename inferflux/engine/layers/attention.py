"""Attention: from hidden states to hidden states, through the paged cache of one layer."""

from dataclasses import dataclass

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.head_norm import HeadNorm
from inferflux.engine.layers.linear import Linear
from inferflux.engine.layers.lora import StepAdapters
from inferflux.engine.layers.rope import Angles
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.metadata import AttentionMetadata

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward share. angles: cos and sin of this step's tokens, one pair per rope. adapters: the
    tokens that are computed with adapters."""

    metadata: AttentionMetadata
    angles: tuple[Angles, ...]
    adapters: StepAdapters | None = None


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads are this rank's. window, scale, soft_cap: see kernels.ops. rope: index into Step.angles; None: NoPE.
    clip: queries, keys and values are cut off there; None: they are not."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    scale: float
    soft_cap: float | None
    rope: int | None
    clip: float | None


class Attention:
    """Projects to queries, keys and values, normalises heads and clips if asked, rotates, caches, attends and projects
    back."""

    def __init__(
        self,
        kernels: KernelSet,
        context: ParallelContext,
        shape: AttentionShape,
        qkv: Linear,
        output: Linear,
        head_norm: HeadNorm | None,
    ) -> None:
        self._kernels = kernels
        self._context = context
        self._shape = shape
        self._qkv = qkv
        self._output = output
        self._head_norm = head_norm

    def __call__(self, hidden: Tensor, kv_pages: Tensor, step: Step) -> Tensor:
        """hidden [T, hidden], kv_pages [P, 2, N, K, D]. Writes this step's keys and values; returns [T, hidden]."""
        shape, kernels, metadata = self._shape, self._kernels, step.metadata
        num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
        qkv = self._qkv(hidden, step.adapters).view(-1, num_heads + 2 * num_kv_heads, shape.head_dim)
        if self._head_norm is not None:
            self._head_norm(qkv[:, : num_heads + num_kv_heads])
        if shape.clip is not None:
            qkv.clamp_(-shape.clip, shape.clip)
        cos, sin = (None, None) if shape.rope is None else step.angles[shape.rope]
        query = kernels.rope(qkv, cos, sin, kv_pages, metadata.slots, num_heads=num_heads)
        mixed = kernels.attention(
            query, kv_pages, metadata, scale=shape.scale, window=shape.window, soft_cap=shape.soft_cap
        )
        mixed = mixed.view(-1, num_heads * shape.head_dim)
        return self._context.all_reduce(self._output(mixed, step.adapters))
