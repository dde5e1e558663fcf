"""Sizes: what of the Triton kernels can be chosen per GPU, as typed tables, and the bounds within which it may be.

Sizes say how work is cut, never what is computed: whatever stands in these tables, results differ in their last bits
at most. None depends on a request's lengths, which would recompile, or change a row's result with its neighbours.
Knows no kernel and no GPU, and imports no Triton. The sizes that the package ships are in `tuning`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Final

# Each the largest padded head that its entry of a table is for.
HEAD_DIMS: Final = (64, 128, 256)
# Of weights in few bits.
SCHEMES: Final = ("int8", "int4", "fp8")
# Experts' weights: those, and the model's own type.
EXPERTS: Final = ("floats", *SCHEMES)
# Of `linear`: one row of x or few, up to MOST_ROWS; matrices with more outputs than inputs, and all others.
ROWS: Final = ("one tall", "one wide", "few tall", "few wide")
MOST_ROWS: Final = 8
# Powers of two but for stages. The least that `tl.dot` takes is 16; a tile of int4 has half as many bytes as inputs.
_BOUNDS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "block_m": (16, 256),
        "block_n": (16, 256),
        "block_k": (32, 256),
        "num_warps": (1, 16),
        "num_stages": (1, 8),
        "pages_ahead": (0, 1),
        "registers": (0, 128),
        "tokens": (128, 8192),
        "most": (1, 1024),
        "merged": (16, 256),
        "last_merges": (0, 256),
        "size": (1, 8192),
        "rows": (1, 8),
        "outputs": (1, 256),
        "inputs": (64, 8192),
        "early": (0, 1),
    }
)
# What a program of these ops takes at a time.
_BLOCK_BOUNDS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"norm": (64, 4096), "activation": (128, 8192), "rope": (1, 64), "sampling": (256, 8192)}
)


class _Bounded:
    """Raises ValueError where a size is out of its bounds."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in _BOUNDS:
                _check(name, value, _BOUNDS[name])


def _check(name: str, value: int, bounds: tuple[int, int]) -> None:
    low, high = bounds
    if not low <= value <= high or (name != "num_stages" and value & (value - 1)):
        kind = "a number" if name == "num_stages" else "a power of two"
        raise ValueError(f"{name} must be {kind} from {low} to {high} (got {value})")


@dataclass(frozen=True)
class AttentionTile(_Bounded):
    """block_m: query rows (tokens x query heads of one KV head) per program; block_n: cached tokens per inner step.
    pages_ahead: steps between reading page numbers and reading what they lead to. registers: of each thread, at most,
    in decode on pages of 16 bits, so that more programs share a multiprocessor; 0: as the compiler likes."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pages_ahead: int = 0
    registers: int = 0


@dataclass(frozen=True)
class Split(_Bounded):
    """How a decode row's context is cut: by its own length alone, so that its sum is the same whatever else is in the
    batch. tokens: cached ones per split, doubled until the row has at most `most` splits. merged: splits that a program
    merges at a time. last_merges: where a row has at most so many, its last program to end merges them; 0: never."""

    tokens: int
    most: int
    merged: int
    last_merges: int = 0


@dataclass(frozen=True)
class Decode:
    """One entry, since longer splits want deeper tiles: fewer programs have to keep as many bytes under way."""

    tile: AttentionTile
    split: Split


@dataclass(frozen=True)
class ProductTile(_Bounded):
    """block_m: rows of x (of a mixture: pairs of token and expert), block_n: outputs, per program; block_k: inputs per
    inner step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProductTiles:
    """By rows of x: few are up to 16, some up to 64. block_k is one for all, so that sums are cut alike whatever the
    batch."""

    few: ProductTile
    some: ProductTile
    many: ProductTile

    def __post_init__(self) -> None:
        if len({self.few.block_k, self.some.block_k, self.many.block_k}) > 1:
            raise ValueError("block_k must be the same for few, some and many rows")


@dataclass(frozen=True)
class RowBlock(_Bounded):
    """rows of x and outputs per program; inputs per inner step."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Block(_Bounded):
    """size: what a program takes at a time, in the op's own terms (see `tuning`), and the warps that share it."""

    size: int
    num_warps: int


@dataclass(frozen=True)
class Launch(_Bounded):
    """early: 1 where the kernels of a decode step start before the one ahead of them has ended (see `start`)."""

    early: int


@dataclass(frozen=True)
class Sizes:
    """Tables by head size, scheme or op. One that lists only some entries is laid `over` one that has all; those of
    `linear` that nobody lists are the vendor's library's to multiply."""

    prefill: Mapping[int, AttentionTile] = field(default_factory=dict)
    decode: Mapping[int, Decode] = field(default_factory=dict)
    linear: Mapping[str, RowBlock] = field(default_factory=dict)
    products: Mapping[str, ProductTiles] = field(default_factory=dict)
    experts: Mapping[str, ProductTile] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)
    launches: Mapping[str, Launch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in _KEYS.items():
            unknown = [key for key in getattr(self, name) if key not in known]
            if unknown:
                raise ValueError(f"{name} has {unknown[0]!r}; accepted: {', '.join(map(str, known))}")
        for op, block in self.blocks.items():
            _check(f"{op}'s size", block.size, _BLOCK_BOUNDS[op])

    def over(self, other: "Sizes") -> "Sizes":
        """Returns the other's tables with these entries in the place of theirs."""
        names = [each.name for each in fields(self)]
        return Sizes(**{name: {**getattr(other, name), **getattr(self, name)} for name in names})


_KEYS: Final[Mapping[str, tuple[int, ...] | tuple[str, ...]]] = MappingProxyType(
    {
        "prefill": HEAD_DIMS,
        "decode": HEAD_DIMS,
        "linear": ROWS,
        "products": SCHEMES,
        "experts": EXPERTS,
        "blocks": tuple(_BLOCK_BOUNDS),
        "launches": ("all",),
    }
)
