"""Sizes that workloads are cut to: one transformer layer of a published model, and how much work is given to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's sizes, and the steps it is timed on.

    decodes: (rows, context tokens of each). prefills: (tokens before, tokens computed). batches: tokens in a step, for
    the ops that know no context.
    """

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    decodes: tuple[Span, ...]
    prefills: tuple[Span, ...]
    batches: tuple[int, ...]

    def matrices(self) -> dict[str, Span]:
        """(outputs, inputs) of the layer's products, by name."""
        all_heads = self.num_heads + 2 * self.num_kv_heads
        return {
            "qkv": (all_heads * self.head_dim, self.hidden),
            "out": (self.hidden, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


# toy: for tests, its figures mean nothing. small: SmolLM2-135M. medium: Qwen2.5-0.5B. large: Llama-3-8B.
SHAPES: Final[Mapping[str, LayerShape]] = MappingProxyType(
    {
        "toy": LayerShape(64, 4, 2, 16, 96, 300, ((3, 40),), ((8, 24),), (1, 5)),
        "small": LayerShape(576, 9, 3, 64, 1536, 32000, ((1, 1024), (32, 512)), ((0, 512), (512, 512)), (1, 16, 256)),
        "medium": LayerShape(896, 14, 2, 64, 4864, 32000, ((1, 1024), (32, 512)), ((0, 512), (512, 512)), (1, 16, 256)),
        "large": LayerShape(
            4096,
            32,
            8,
            128,
            14336,
            128256,
            ((1, 2048), (1, 65536), (64, 8192)),
            ((0, 8192), (4096, 2048)),
            (1, 64, 2048),
        ),
    }
)
