"""Case: one set of sample inputs of one op, and how its numbers are drawn."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor


class Inputs(NamedTuple):
    """One call's arguments, made for it alone. For ops that `pack` the positional ones are weight, bias and x."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Draw:
    """Draws a case's numbers. Integers and float64 noise keep their types, all else becomes `dtype`."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.float(torch.randn(shape, generator=self.generator) * scale)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator)

    def float(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).to(self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """`build` makes the arguments; call `inputs` for a fresh set, since ops may overwrite theirs."""

    op: str
    name: str
    build: Callable[[Draw], Inputs] = field(repr=False)

    def inputs(self, dtype: torch.dtype, device: torch.device, *, other: bool = False) -> Inputs:
        """other: with other numbers, in the same forms."""
        seed = zlib.crc32(f"{self.op} {self.name}".encode())
        generator = torch.Generator().manual_seed(seed + other)
        return self.build(Draw(dtype, device, generator))


def pack(op: str, implementation: Any, inputs: Inputs) -> Any:
    """Gives an op that packs its weights: each of several experts' in turn, as a model does that is being loaded."""
    weights = inputs.positional[:2]
    return implementation.pack(*(map(iter, weights) if op.endswith("moe") else weights))


def apart(values: Tensor) -> Tensor:
    """Returns the same numbers as a view whose rows stand further apart than they are long, with NaN between them
    (integers: the largest)."""
    poison = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), poison)
    wide[..., :-3] = values
    return wide[..., :-3]


NamedCases = Iterator[tuple[str, Callable[[Draw], Inputs]]]
