"""The second step of decode attention: a row's splits become one, weighed by their log-sum-exps (Flash-Decoding)."""

import triton
import triton.language as tl


@triton.jit
def splits_of(kv_length, window, SPLIT_TOKENS: tl.constexpr, MOST_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first token that the row's query sees, where its first split begins; and the tokens of each split."""
    first = tl.maximum(kv_length - window, 0) if HAS_WINDOW else 0
    factor = 1
    while factor * (SPLIT_TOKENS * MOST_SPLITS) < kv_length - first:
        factor *= 2
    return first, factor * SPLIT_TOKENS


@triton.jit(do_not_specialize=["num_splits", "window"])
def merge_kernel(
    output,  # [B, H, D]
    partial,
    log_sums,
    kv_lengths,
    num_splits,
    window,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (row, head): the weighted mean of the row's splits, BLOCK_S of them at a time, in their order."""
    row = tl.program_id(0).to(tl.int64)
    slot = row * NUM_HEADS + tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    mask = dims < HEAD_DIM
    kv_length = tl.load(kv_lengths + row)
    first, split_tokens = splits_of(kv_length, window, SPLIT_TOKENS, MOST_SPLITS, HAS_WINDOW)
    count = tl.cdiv(kv_length - first, split_tokens)
    if count == 1:  # most rows of a launch for longer ones
        only = tl.load(partial + slot * num_splits * HEAD_DIM + dims, mask=mask, other=0.0)
        tl.store(output + slot * HEAD_DIM + dims, only.to(output.dtype.element_ty), mask=mask)
        return
    accumulator = tl.zeros([PADDED_DIM], tl.float32)
    maximum = float("-inf")
    total = 0.0
    for start in range(0, count, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        inside = splits < count
        places = slot * num_splits + splits
        log_sums_here = tl.load(log_sums + places, mask=inside, other=float("-inf"))
        values = tl.load(
            partial + places[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None] & mask[None, :], other=0.0
        )
        new_maximum = tl.maximum(maximum, tl.max(log_sums_here, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2(maximum - shift)
        weights = tl.exp2(log_sums_here - shift)
        accumulator = accumulator * decay + tl.sum(values * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        maximum = new_maximum
    accumulator = accumulator / tl.where(total == 0.0, 1.0, total)
    tl.store(output + slot * HEAD_DIM + dims, accumulator.to(output.dtype.element_ty), mask=mask)
