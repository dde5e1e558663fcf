"""Tuned sizes of the Triton kernels, each with the measurement it rests on.

One place, so that a new GPU is a new measurement and not a hunt. Nothing here depends on a request's lengths: a size
that did would recompile, or change a row's result with its neighbours.
"""

import functools
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from triton import knobs, next_power_of_2


class Gpu(NamedTuple):
    """What sizes and kernels depend on. shared_bytes: what a program may have of a multiprocessor's shared memory.
    has_float8: whether there are instructions for it (Ada, Hopper and newer)."""

    shared_bytes: int
    has_float8: bool


H100: Final = Gpu(227 * 1024, has_float8=True)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Under the interpreter nothing is scarce but float8's rounding (see `narrow`)."""
    if knobs.runtime.interpret:
        return Gpu(2**31, has_float8=False)
    if device.type != "cuda":
        return H100  # to be compiled for
    facts = torch.cuda.get_device_properties(device)
    return Gpu(facts.shared_memory_per_block_optin, (facts.major, facts.minor) >= (8, 9))


@dataclass(frozen=True)
class AttentionTile:
    """block_m: query rows (tokens x query heads of one KV head) per program; block_n: cached tokens per inner step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Head size 128, bfloat16, Llama-3-8B's heads, one H200, torch 2.11, triton 3.6 (`scripts/gpu_check.sh` times others).
# Prefill of 8192 tokens, of 2048 after 4096, us, by (block_m, block_n, warps, stages): (128, 64, 4, 4) 1376, 491;
# (128, 128, 8, 3) 1452, 472; (256, 64, 16, 3) 1351, 500; (64, 64, 4, 3) 1627, 496; (128, 64, 8, 2) 2044, 743.
# Decode of 1 x 65536, of 64 x 8192: (32, 2, 4) 90, 525; (64, 2, 3) 94, 531; (64, 4, 3) 97, 531; (32, 4, 3) 110, 537.
# Head size 64, the same workloads: (128, 128, 4, 3) 776, 284; (128, 64, 4, 3) 854, 301; (128, 128, 8, 3) 1040, 340;
# decode (64, 2, 4) 50, 291; (64, 4, 3) 60, 293. 256: (128, 64, 8, 2) 2285, 751; (64, 32, 4, 3) 3060, 1025;
# (64, 32, 8, 2) 7032, 2109; decode (32, 2, 3) 147, 1045; (32, 4, 2) 155, 1052.
PREFILL = {
    64: AttentionTile(block_m=128, block_n=128, num_warps=4, num_stages=3),
    128: AttentionTile(block_m=128, block_n=64, num_warps=4, num_stages=4),
    256: AttentionTile(block_m=128, block_n=64, num_warps=8, num_stages=2),
}
DECODE = {
    64: AttentionTile(block_m=16, block_n=64, num_warps=2, num_stages=4),
    128: AttentionTile(block_m=16, block_n=32, num_warps=2, num_stages=4),
    256: AttentionTile(block_m=16, block_n=32, num_warps=2, num_stages=3),
}
# float32 tiles are twice as large in shared memory.
FLOAT32_BLOCK_M, FLOAT32_BLOCK_N = 64, 32

# Cached tokens per decode split. Fixed, so that a row's sum is cut at the same places whatever else is in the batch.
# Llama-3-8B heads, 8k tokens: 16 splits x 8 KV heads = 128 programs per row, about one wave of 132 multiprocessors.
DECODE_SPLIT_TOKENS = 512
# Splits that a program merges at a time. On an H200 a turn takes 3 us, whatever its size: 128 splits by 16, 26 us.
MERGED_SPLITS = 64

# Of `tl.dot`.
SMALLEST_BLOCK = 16

# Triton's interpreter pays by the step, whatever its size: fewer and larger ones there, of this many tokens.
INTERPRETED_BLOCK_N = 256


def attention_tile(
    table: dict[int, AttentionTile], padded_head_dim: int, group: int, dtype: torch.dtype, gpu: Gpu
) -> AttentionTile:
    """Returns the tile for the smallest listed head size that holds `padded_head_dim`, for queries in `dtype`, of which
    `group` heads share a key head; smaller than listed where the GPU has less shared memory than an H100."""
    tile = next(table[size] for size in sorted(table) if padded_head_dim <= size)
    if dtype == torch.float32:
        tile = replace(tile, block_m=min(tile.block_m, FLOAT32_BLOCK_M), block_n=min(tile.block_n, FLOAT32_BLOCK_N))
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


# Logits per inner step and the warps that share them. Not yet measured on a GPU: the search compares every logit with
# 16 candidates in float64, which are then 32 numbers a thread.
SAMPLING_BLOCK = 1024
SAMPLING_WARPS = 16
# Two steps for a vocabulary of 32000.
INTERPRETED_SAMPLING_BLOCK = 16384


def sampling_block(vocab_size: int) -> int:
    """One for all vocabularies, but for the interpreter, which also pays for what is masked."""
    if knobs.runtime.interpret:
        return min(next_power_of_2(vocab_size), INTERPRETED_SAMPLING_BLOCK)
    return SAMPLING_BLOCK


@dataclass(frozen=True)
class ProductTile:
    """block_m: rows of x, block_n: outputs, per program; block_k: inputs per inner step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By rows of x at most. Not yet measured on a GPU. Few rows: narrow programs, so that a matrix of 4096 outputs occupies
# all 132 multiprocessors of an H100/H200. block_k is one for all, so that sums are cut alike whatever the batch.
PRODUCT = {
    16: ProductTile(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4),
    64: ProductTile(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
}
LARGE_PRODUCT = ProductTile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=2)
# float32 is multiplied number by number, each an instruction of its own: of the sizes above Triton makes programs for
# minutes, which then do not fit into the registers and the shared memory of smaller GPUs.
FLOAT32_PRODUCT = ProductTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)


def product_tile(num_rows: int, dtype: torch.dtype) -> ProductTile:
    """Returns the tile for so many rows of x in `dtype`."""
    if knobs.runtime.interpret:
        return LARGE_PRODUCT
    if dtype == torch.float32:
        return FLOAT32_PRODUCT
    return next((tile for limit, tile in PRODUCT.items() if num_rows <= limit), LARGE_PRODUCT)


# Heads per program of the rotation. Not yet measured on a GPU: 8 of 128 dims are 8 numbers for each thread of 4 warps.
ROPE_HEADS = 8


def rope_heads(all_heads: int) -> int:
    return next_power_of_2(all_heads) if knobs.runtime.interpret else ROPE_HEADS
