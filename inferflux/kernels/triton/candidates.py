"""Candidates: sizes that `inferflux kernels tune` measures beside the shipped ones, which it adds itself.

Chosen from what was measured on an H200 and from the machine code that Triton makes for it, and so that each kind of
GPU finds some: tiles of Hopper's warp groups, the smaller ones that the tensor cores of Ampere and Ada like, and such
as fit into 99 KiB of shared memory. What does not compile or fit on a GPU is left out there. The most promising come
first, since there may be no time for the last. Knows no GPU.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from inferflux.kernels.triton.sizes import AttentionTile, Block, Decode, Launch, ProductTile, RowBlock, Split

# By head size: (block_m, block_n, warps, stages, pages ahead). Where page numbers and what they lead to are read in the
# same turn, each has half of the stages: (128, 32, 4, 5) and (128, 32, 4, 7) ask for tiles a turn or two ahead, and the
# shipped ones for none. Read a turn before, they leave all stages but one to keys and values.
PREFILL: Final[Mapping[int, tuple[AttentionTile, ...]]] = MappingProxyType(
    {
        64: (
            AttentionTile(128, 64, 4, 3),
            AttentionTile(128, 64, 4, 5),
            AttentionTile(128, 32, 4, 5),
            AttentionTile(64, 64, 4, 3),
            AttentionTile(128, 128, 8, 3),
            AttentionTile(128, 128, 8, 3, 1),
            AttentionTile(128, 64, 4, 3, 1),
            AttentionTile(64, 64, 4, 3, 1),
        ),
        128: (
            AttentionTile(128, 128, 8, 3, 1),
            AttentionTile(256, 64, 16, 3, 1),
            AttentionTile(128, 32, 4, 4, 1),
            AttentionTile(128, 64, 8, 3, 1),
            AttentionTile(128, 32, 4, 5),
            AttentionTile(256, 32, 16, 5),
            AttentionTile(128, 128, 8, 3),
            AttentionTile(256, 64, 16, 3),
            AttentionTile(128, 32, 4, 7),
            AttentionTile(64, 64, 4, 3),
            AttentionTile(64, 32, 4, 5),
        ),
    }
)


def _decodes(splits: tuple[Split, ...], *tiles: tuple[int, ...]) -> tuple[Decode, ...]:
    return tuple(Decode(AttentionTile(16, *tile), split) for tile in tiles for split in splits)


# Of Llama-3-8B's row of 65,536 tokens: 1024, 512, 256 and 128 programs. An H200 has 132 multiprocessors, each of which
# must have some 30 KB under way: two programs with two tiles of 64 do, and five of the shipped with one of 32.
_128, _64, _32, _16 = (Split(512, most, 64) for most in (128, 64, 32, 16))
# Merged by the last program, in one or two trips to memory: no launch, and nobody else at work meanwhile.
_128_LAST, _32_LAST, _16_LAST = Split(512, 128, 64, 16), Split(512, 32, 64, 32), Split(512, 16, 64, 16)
# A row of some hundred tokens is read by a few programs in place of one, and one of 8192 is cut as the shipped does it.
_SHORT_32, _SHORT_16 = Split(128, 32, 64, 32), Split(128, 16, 64, 16)
# block_m is that of 16 query heads at most: (block_n, warps, stages, pages ahead, registers).
DECODE: Final[Mapping[int, tuple[Decode, ...]]] = MappingProxyType(
    {
        64: (
            *_decodes((_SHORT_32, _SHORT_16), (64, 4, 4, 1)),
            *_decodes((_64, _32), (64, 2, 4, 0, 128), (64, 2, 4, 1), (64, 4, 4, 1), (128, 4, 3, 1)),
            *_decodes((_128_LAST, _32_LAST), (64, 2, 4, 0, 128), (64, 2, 4, 1)),
            *_decodes((_16,), (128, 4, 4, 1)),
            *_decodes((_128,), (64, 2, 4), (64, 2, 5), (64, 4, 3), (128, 4, 5), (32, 2, 5), (64, 2, 3, 1)),
            *_decodes((Split(512, 128, 128), Split(1024, 128, 64), Split(256, 128, 64)), (64, 2, 4, 0, 128)),
        ),
        128: (
            *_decodes((_SHORT_16, _16_LAST), (128, 8, 3, 1), (64, 4, 4, 1)),
            *_decodes((_SHORT_32, _32_LAST), (64, 4, 4, 1), (64, 4, 3, 1)),
            *_decodes((_64, _32), (64, 4, 3, 1), (32, 2, 4, 1)),
            *_decodes((_32, _16), (64, 4, 4, 1), (128, 8, 3, 1)),
            *_decodes((_64, _32, _128_LAST, _32_LAST), (32, 2, 4, 0, 128)),
            *_decodes((_128,), (32, 2, 4), (32, 2, 3, 1), (64, 4, 3, 1), (32, 2, 5), (64, 4, 3)),
            *_decodes((Split(512, 128, 128), Split(1024, 128, 64), Split(256, 128, 64)), (32, 2, 4, 0, 128)),
        ),
    }
)
# Of `linear`, by rows and shape: (rows, outputs, inputs, warps, stages). Beside them stands the vendor's library.
_ONE: Final = (
    RowBlock(1, 1, 4096, 8, 1),
    RowBlock(1, 2, 2048, 8, 1),
    RowBlock(1, 4, 1024, 4, 1),
    RowBlock(1, 2, 2048, 4, 1),
    RowBlock(1, 2, 4096, 8, 1),
    RowBlock(8, 16, 256, 4, 4),
    RowBlock(8, 32, 256, 4, 4),
    RowBlock(8, 64, 128, 4, 5),
)
_FEW: Final = (
    RowBlock(8, 16, 256, 2, 5),
    RowBlock(8, 16, 256, 4, 4),
    RowBlock(8, 32, 256, 4, 4),
    RowBlock(8, 32, 512, 4, 3),
    RowBlock(8, 64, 128, 4, 5),
    RowBlock(8, 64, 256, 4, 4),
    RowBlock(8, 128, 128, 8, 4),
)
LINEAR: Final[Mapping[str, tuple[RowBlock, ...]]] = MappingProxyType(
    {"one tall": _ONE, "one wide": _ONE, "few tall": _FEW, "few wide": _FEW}
)
# Of weights in few bits, by rows of x. block_k is that of the shipped ones: one for all.
PRODUCTS: Final[Mapping[str, tuple[ProductTile, ...]]] = MappingProxyType(
    {
        "few": (
            ProductTile(16, 32, 128, 4, 6),
            ProductTile(16, 64, 128, 4, 4),
            ProductTile(16, 32, 128, 2, 4),
            ProductTile(16, 128, 128, 8, 3),
        ),
        "some": (
            ProductTile(64, 64, 128, 4, 4),
            ProductTile(64, 32, 128, 4, 4),
            ProductTile(64, 128, 128, 8, 3),
            ProductTile(32, 64, 128, 4, 3),
        ),
        "many": (
            ProductTile(128, 128, 128, 8, 3),
            ProductTile(128, 64, 128, 4, 3),
            ProductTile(64, 128, 128, 4, 3),
            ProductTile(128, 256, 128, 8, 2),
        ),
    }
)
# Of a mixture: (pairs, outputs, inputs, warps, stages).
EXPERTS: Final = (
    ProductTile(16, 64, 64, 4, 3),
    ProductTile(16, 64, 64, 4, 5),
    ProductTile(16, 128, 64, 4, 4),
    ProductTile(32, 64, 64, 4, 4),
    ProductTile(64, 64, 64, 4, 3),
)
BLOCKS: Final[Mapping[str, tuple[Block, ...]]] = MappingProxyType(
    {
        "norm": (Block(128, 16), Block(256, 16), Block(1024, 16), Block(2048, 16)),
        "activation": (Block(512, 2), Block(1024, 2), Block(2048, 4), Block(2048, 8), Block(4096, 8)),
        "rope": (Block(2, 1), Block(4, 2), Block(4, 4), Block(8, 2), Block(16, 4), Block(16, 8)),
        "sampling": (Block(512, 8), Block(512, 16), Block(1024, 8), Block(2048, 8), Block(2048, 16)),
    }
)
LAUNCHES: Final = (Launch(early=1),)
