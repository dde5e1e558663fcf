"""Sampling without waiting for the device: one program per row, filters found by a search over the bits of the logits.

Logits are compared as integers that order like the floats do. The threshold of top_k (or top_p) is the largest integer
above which there are still k tokens (or the mass wanted), found four bits at a time: eight passes over a row that lies
in the L2 cache. A row pays only for the filters it has. Masses are summed in float64, as the op demands.

Loops over the vocabulary have no sum or largest over the program's threads but for the draw's: each thread keeps its
own, so that several blocks are on their way at once, and they meet at the end.
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.ops import TOP_P_TOLERANCE
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.sizes import Sizes

SMALLEST_SHARE = tl.constexpr(1e-12)


@triton.jit
def _keys(values):
    """float32 -> uint32 that order alike; both zeros are one."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _load(row_pointer, start, vocab_size, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row_pointer + columns, mask=columns < vocab_size, other=float("-inf"))


@triton.jit
def _weights(values, largest, temperature, least):
    """exp((value - largest) / temperature), 0 where the key is below `least`; float64."""
    weights = tl.exp((values - largest) / temperature)
    return tl.where(_keys(values) >= least, weights, 0.0).to(tl.float64)


@triton.jit
def _mass(row_pointer, vocab_size, largest, temperature, least, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab_size, BLOCK, loop_unroll_factor=4):
        total += _weights(_load(row_pointer, start, vocab_size, BLOCK), largest, temperature, least)
    return tl.sum(total, 0)


@triton.jit
def _largest(row_pointer, vocab_size, BLOCK: tl.constexpr):
    """The largest logit, and the first token that has it."""
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    starts = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocab_size, BLOCK, loop_unroll_factor=8):
        values = _load(row_pointer, start, vocab_size, BLOCK)
        starts = tl.where(values > peaks, start, starts)
        peaks = tl.maximum(peaks, values)
    largest = tl.max(peaks, 0)
    return largest, tl.min(tl.where(peaks == largest, starts + tl.arange(0, BLOCK), vocab_size), 0)


@triton.jit
def _least_of_top_k(row_pointer, vocab_size, top_k, BLOCK: tl.constexpr):
    """The largest key that at least top_k tokens reach."""
    digits = tl.arange(0, 16).to(tl.uint32)
    least = tl.zeros([], tl.uint32)
    for step in tl.static_range(8):
        candidates = least + (digits << (28 - 4 * step))
        counts = tl.zeros([BLOCK, 16], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = _keys(_load(row_pointer, start, vocab_size, BLOCK))
            reached = (keys[:, None] >= candidates[None, :]) & (columns < vocab_size)[:, None]
            counts += reached.to(tl.int32)
        # Candidates grow and counts fall: those that pass are the first ones, and the first of all always does.
        passed = tl.sum((tl.sum(counts, 0) >= top_k).to(tl.int32), 0)
        least += (passed - 1).to(tl.uint32) << (28 - 4 * step)
    return least


@triton.jit
def _least_of_top_p(row_pointer, vocab_size, largest, temperature, least, wanted, BLOCK: tl.constexpr):
    """The largest key, `least` or above, such that the tokens that reach it have the wanted mass."""
    digits = tl.arange(0, 16).to(tl.uint32)
    found = tl.zeros([], tl.uint32)
    for step in tl.static_range(8):
        candidates = found + (digits << (28 - 4 * step))
        masses = tl.zeros([BLOCK, 16], tl.float64)
        for start in range(0, vocab_size, BLOCK):
            values = _load(row_pointer, start, vocab_size, BLOCK)
            weights = _weights(values, largest, temperature, least)
            reached = _keys(values)[:, None] >= candidates[None, :]
            masses += tl.where(reached, weights[:, None], 0.0)
        passed = tl.maximum(tl.sum((tl.sum(masses, 0) >= wanted).to(tl.int32), 0), 1)
        found += (passed - 1).to(tl.uint32) << (28 - 4 * step)
    return tl.maximum(least, found)


@triton.jit
def _draw(row_pointer, vocab_size, largest, temperature, least, target, BLOCK: tl.constexpr):
    """The first token, in order of ids, with which the running sum exceeds `target`."""
    start = 0
    passed = tl.zeros([], tl.float64)
    # Eight blocks at a time up to the eight that have it.
    WIDE: tl.constexpr = 8 * BLOCK
    mass = tl.sum(_weights(_load(row_pointer, start, vocab_size, WIDE), largest, temperature, least), 0)
    while (passed + mass <= target) & (start + WIDE < vocab_size):
        passed += mass
        start += WIDE
        mass = tl.sum(_weights(_load(row_pointer, start, vocab_size, WIDE), largest, temperature, least), 0)
    weights = _weights(_load(row_pointer, start, vocab_size, BLOCK), largest, temperature, least)
    mass = tl.sum(weights, 0)
    while (passed + mass <= target) & (start + BLOCK < vocab_size):
        passed += mass
        start += BLOCK
        weights = _weights(_load(row_pointer, start, vocab_size, BLOCK), largest, temperature, least)
        mass = tl.sum(weights, 0)
    columns = start + tl.arange(0, BLOCK)
    exceeds = (passed + tl.cumsum(weights, 0) > target) & (weights > 0.0)
    first = tl.min(tl.where(exceeds, columns, vocab_size), 0)
    # Two ways to sum may differ in the last place: then it is the last token of the block that has any mass.
    last = tl.max(tl.where(weights > 0.0, columns, 0), 0)
    return tl.where(first < vocab_size, first, last)


@triton.jit(do_not_specialize=["vocab_size", "stride_row"])
def _sampling_kernel(
    tokens,  # int64 [B]
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    vocab_size,
    stride_row,
    TOP_P_TOLERANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits + row * stride_row
    largest, token = _largest(row_pointer, vocab_size, BLOCK)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row).to(tl.float64)
        min_p = tl.load(min_ps + row)
        least = tl.zeros([], tl.uint32)
        if (top_k > 0) & (top_k < vocab_size):
            least = _least_of_top_k(row_pointer, vocab_size, top_k, BLOCK)
        if top_p < 1.0:
            # Never nothing: the likeliest token, whose weight is 1, has some mass however little is wanted.
            share = tl.maximum(top_p - TOP_P_TOLERANCE, SMALLEST_SHARE)
            wanted = share * _mass(row_pointer, vocab_size, largest, temperature, least, BLOCK)
            # 16 sums in float64 for each logit of a block: of whole ones they would not stay in registers.
            least = _least_of_top_p(row_pointer, vocab_size, largest, temperature, least, wanted, BLOCK // 2)
        if min_p > 0.0:
            # exp((x - largest) / temperature) >= min_p, as a bound on x.
            least = tl.maximum(least, _keys(largest + temperature * tl.log(min_p)))
        target = tl.load(uniforms + row) * _mass(row_pointer, vocab_size, largest, temperature, least, BLOCK)
        token = _draw(row_pointer, vocab_size, largest, temperature, least, target, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))


def sampling(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    sizes: Sizes | None = None,
) -> torch.Tensor:
    """See `ops.SamplingOp`. Leaves logits as they are. sizes: others than this GPU's."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    columns = [column.contiguous() for column in (temperature, top_k, top_p, min_p, uniform)]
    # Logits are float32 whatever the model computes in.
    block = (sizes or tuning.sizes_on(logits.device)).blocks["sampling"]
    _sampling_kernel[(num_rows,)](
        tokens, logits, *columns, vocab_size, logits.stride(0),
        TOP_P_TOLERANCE=TOP_P_TOLERANCE, BLOCK=tuning.sampling_block(block.size, vocab_size), num_warps=block.num_warps,
    )  # fmt: skip
    return tokens
