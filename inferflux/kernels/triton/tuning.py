"""Tuned sizes of the Triton kernels, each with the measurement it rests on, and which of them serve where.

One place, so that a new GPU is a new measurement and not a hunt: `inferflux kernels tune` makes it, and what it found
lies over what is shipped here (see `size_table`).
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

import torch
from triton import __version__, knobs, next_power_of_2

from inferflux.kernels.triton import size_table
from inferflux.kernels.triton.size_table import SizeTable
from inferflux.kernels.triton.sizes import AttentionTile, Block, Decode, Launch, ProductTile, ProductTiles, Sizes, Split

Entry = TypeVar("Entry")


class Gpu(NamedTuple):
    """What sizes and kernels depend on. shared_bytes: what a program may have of a multiprocessor's shared memory.
    has_float8: whether there are instructions for it (Ada, Hopper and newer). starts_early: whether kernels can be
    started so (see `start`; Hopper and newer). name: None where nothing was measured."""

    shared_bytes: int
    has_float8: bool
    starts_early: bool = False
    name: str | None = None


H100: Final = Gpu(227 * 1024, has_float8=True, starts_early=True)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Under the interpreter nothing is scarce but float8's rounding (see `codes`)."""
    if knobs.runtime.interpret:
        return Gpu(2**31, has_float8=False)
    if device.type != "cuda":
        return H100  # to be compiled for
    facts = torch.cuda.get_device_properties(device)
    return Gpu(facts.shared_memory_per_block_optin, (facts.major, facts.minor) >= (8, 9), facts.major >= 9, facts.name)


# Attention by head size.
# Head size 128, bfloat16, Llama-3-8B's heads, one H200, torch 2.11, triton 3.6 (`scripts/gpu_check.sh` times others).
# Prefill of 8192 tokens, of 2048 after 4096, us, by (block_m, block_n, warps, stages): (128, 64, 4, 4) 1376, 491;
# (128, 128, 8, 3) 1452, 472; (256, 64, 16, 3) 1351, 500; (64, 64, 4, 3) 1627, 496; (128, 64, 8, 2) 2044, 743.
# Decode of 1 x 65536, of 64 x 8192: (32, 2, 4) 90, 525; (64, 2, 3) 94, 531; (64, 4, 3) 97, 531; (32, 4, 3) 110, 537.
# Head size 64, the same workloads: (128, 128, 4, 3) 776, 284; (128, 64, 4, 3) 854, 301; (128, 128, 8, 3) 1040, 340;
# decode (64, 2, 4) 50, 291; (64, 4, 3) 60, 293. 256: (128, 64, 8, 2) 2285, 751; (64, 32, 4, 3) 3060, 1025;
# (64, 32, 8, 2) 7032, 2109; decode (32, 2, 3) 147, 1045; (32, 4, 2) 155, 1052.
_PREFILL: Final = {
    64: AttentionTile(block_m=128, block_n=128, num_warps=4, num_stages=3),
    128: AttentionTile(block_m=128, block_n=64, num_warps=4, num_stages=4),
    256: AttentionTile(block_m=128, block_n=64, num_warps=8, num_stages=2),
}
# Llama-3-8B heads, 8k tokens: 16 splits x 8 KV heads = 128 programs per row, about one wave of 132 multiprocessors.
# On an H200 a turn of the merge takes 3 us, whatever its size: 128 splits by 16, 26 us. Rows of more than 65,536 tokens
# were not measured: they have no more programs than that. Of 128 registers, eight programs share a multiprocessor, and
# all 1024 of such a row are at work at once; the compiler would take up to 148, for six or seven.
_SPLIT: Final = Split(tokens=512, most=128, merged=64)
_DECODE: Final = {
    64: Decode(AttentionTile(block_m=16, block_n=64, num_warps=2, num_stages=4, registers=128), _SPLIT),
    128: Decode(AttentionTile(block_m=16, block_n=32, num_warps=2, num_stages=4, registers=128), _SPLIT),
    256: Decode(AttentionTile(block_m=16, block_n=32, num_warps=2, num_stages=3), _SPLIT),
}
# Not yet measured on a GPU. Few rows: narrow programs, so that a matrix of 4096 outputs occupies all 132
# multiprocessors of an H100/H200.
_PRODUCTS: Final = ProductTiles(
    few=ProductTile(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4),
    some=ProductTile(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
    many=ProductTile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=2),
)
# Not yet measured on a GPU. Small row tiles: a decode step gives an expert a handful of tokens. Quantised: two groups
# of int4's columns a step, whose bytes then make a tile of 32.
_FLOAT_EXPERTS: Final = ProductTile(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3)
_QUANTIZED_EXPERTS: Final = ProductTile(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3)
# Not yet measured on a GPU. norm: elements of a row per warp, of at most num_warps of them, so that a thread has about
# 16: 8 warps for Llama-3-8B's 4096. activation: columns per program. rope: heads per program; 8 of 128 dims are 8
# numbers for each thread of 4 warps. sampling: logits per inner step; the search compares every one with 16 candidates
# in float64, which are then 32 numbers a thread.
_BLOCKS: Final = {
    "norm": Block(size=512, num_warps=16),
    "activation": Block(size=1024, num_warps=4),
    "rope": Block(size=8, num_warps=4),
    "sampling": Block(size=1024, num_warps=16),
}
SHIPPED: Final = Sizes(
    prefill=_PREFILL,
    decode=_DECODE,
    products={"int8": _PRODUCTS, "int4": _PRODUCTS, "fp8": _PRODUCTS},
    experts={
        "floats": _FLOAT_EXPERTS,
        "int8": _QUANTIZED_EXPERTS,
        "int4": _QUANTIZED_EXPERTS,
        "fp8": _QUANTIZED_EXPERTS,
    },
    blocks=_BLOCKS,
    # Not yet measured on a GPU.
    launches={"all": Launch(early=0)},
)

# float32 tiles are twice as large in shared memory.
FLOAT32_BLOCK_M, FLOAT32_BLOCK_N = 64, 32
# float32 is multiplied number by number, each an instruction of its own: of the sizes above Triton makes programs for
# minutes, which then do not fit into the registers and the shared memory of smaller GPUs.
FLOAT32_PRODUCT = ProductTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)

# Of `tl.dot`.
SMALLEST_BLOCK = 16
FEW_ROWS, SOME_ROWS = 16, 64

# Triton's interpreter pays by the step, whatever its size: fewer and larger ones there, of this many tokens; two steps
# for a vocabulary of 32000.
INTERPRETED_BLOCK_N = 256
INTERPRETED_SAMPLING_BLOCK = 16384


@functools.cache
def measured_on(device: torch.device) -> SizeTable | None:
    """Returns what was measured on GPUs of this name with this Triton, as it stood when this process first asked."""
    name = gpu_of(device).name
    return None if name is None else size_table.read(name, __version__)


@functools.cache
def sizes_on(device: torch.device) -> Sizes:
    """Returns the shipped sizes with those over them that were measured on the device."""
    table = measured_on(device)
    return SHIPPED if table is None else table.sizes.over(SHIPPED)


def sizes_for(device: torch.device, dtype: torch.dtype) -> Sizes:
    """Returns the sizes for an op on values in `dtype`. Measured are those of 16 bits: with float32, twice as large,
    tiles that are as good as they can be might not fit."""
    return SHIPPED if dtype == torch.float32 else sizes_on(device)


def start_of(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Returns what kernels are launched with to start as these sizes say, where the GPU can."""
    if sizes.launches["all"].early and gpu_of(device).starts_early:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def listed(table: Mapping[int, Entry], padded_head_dim: int) -> Entry:
    """Returns the entry for the smallest listed head size that holds `padded_head_dim`."""
    return next(table[size] for size in sorted(table) if padded_head_dim <= size)


def attention_tile(
    tile: AttentionTile, padded_head_dim: int, group: int, dtype: torch.dtype, gpu: Gpu
) -> AttentionTile:
    """Returns the listed tile for queries in `dtype`, of which `group` heads share a key head; smaller where the GPU
    has less shared memory than an H100."""
    if dtype == torch.float32:
        tile = replace(
            tile,
            block_m=min(tile.block_m, FLOAT32_BLOCK_M),
            block_n=min(tile.block_n, FLOAT32_BLOCK_N),
            registers=0,
        )
    least = next_power_of_2(group)
    tile = replace(tile, block_m=max(tile.block_m, least))
    if knobs.runtime.interpret:
        return replace(tile, block_n=INTERPRETED_BLOCK_N)
    while attention_bytes(tile, padded_head_dim, dtype) > gpu.shared_bytes and tile.block_n > SMALLEST_BLOCK:
        if tile.block_m > max(tile.block_n, least):
            tile = replace(tile, block_m=tile.block_m // 2, num_warps=max(tile.num_warps // 2, 4))
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def attention_bytes(tile: AttentionTile, padded_head_dim: int, dtype: torch.dtype) -> int:
    """Shared memory of a program, at most: queries, keys, values and weights."""
    sums = tile.block_m * padded_head_dim + 2 * tile.block_n * padded_head_dim + tile.block_m * tile.block_n
    return sums * dtype.itemsize


def product_tile(tiles: ProductTiles, num_rows: int, dtype: torch.dtype) -> ProductTile:
    """Returns the tile for so many rows of x in `dtype`."""
    if knobs.runtime.interpret:
        return tiles.many
    if dtype == torch.float32:
        return FLOAT32_PRODUCT
    if num_rows <= FEW_ROWS:
        return tiles.few
    return tiles.some if num_rows <= SOME_ROWS else tiles.many


def sampling_block(size: int, vocab_size: int) -> int:
    """One for all vocabularies, but for the interpreter, which also pays for what is masked."""
    return min(next_power_of_2(vocab_size), INTERPRETED_SAMPLING_BLOCK) if knobs.runtime.interpret else size


def rope_heads(size: int, all_heads: int) -> int:
    return next_power_of_2(all_heads) if knobs.runtime.interpret else size
