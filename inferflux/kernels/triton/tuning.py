"""Tuned sizes of the Triton kernels, each with the measurement it rests on.

One place, so that a new GPU is a new measurement and not a hunt. Nothing here depends on a request's lengths: a size
that did would recompile, or change a row's result with its neighbours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionTile:
    """block_m: query rows (tokens x query heads of one KV head) per program; block_n: cached tokens per inner step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Not yet measured on a GPU: sizes that fit the 228 KiB of shared memory of an H100/H200 at head size 128, 16 bits,
# after the tile shapes that published paged-attention work converged on. `scripts/gpu_check.sh` times them.
PREFILL = {
    64: AttentionTile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    128: AttentionTile(block_m=128, block_n=64, num_warps=8, num_stages=2),
    256: AttentionTile(block_m=64, block_n=32, num_warps=8, num_stages=2),
}
DECODE = {
    64: AttentionTile(block_m=16, block_n=64, num_warps=4, num_stages=3),
    128: AttentionTile(block_m=16, block_n=64, num_warps=4, num_stages=3),
    256: AttentionTile(block_m=16, block_n=32, num_warps=4, num_stages=2),
}
# float32 tiles are twice as large in shared memory.
FLOAT32_BLOCK_N = 32

# Cached tokens per decode split. Fixed, so that a row's sum is cut at the same places whatever else is in the batch.
# Llama-3-8B heads, 8k tokens: 16 splits x 8 KV heads = 128 programs per row, about one wave of 132 multiprocessors.
DECODE_SPLIT_TOKENS = 512


def tile(table: dict[int, AttentionTile], padded_head_dim: int) -> AttentionTile:
    """Returns the tile for the smallest listed head size that holds `padded_head_dim`."""
    return next(table[size] for size in sorted(table) if padded_head_dim <= size)
