"""The second step of decode attention: a row's splits become one, weighed by their log-sum-exps (Flash-Decoding).

In a launch of its own, or by whichever program finishes a row's last split. Which of the two is a matter of the row's
own length, and so is the order of the sum: the result is the same whoever is last and whatever else is in the batch.
"""

import triton
import triton.language as tl

from inferflux.kernels.triton.start import begin


@triton.jit
def splits_of(kv_length, window, SPLIT_TOKENS: tl.constexpr, MOST_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first token that the row's query sees, where its first split begins; and the tokens of each split."""
    first = tl.maximum(kv_length - window, 0) if HAS_WINDOW else 0
    factor = 1
    while factor * (SPLIT_TOKENS * MOST_SPLITS) < kv_length - first:
        factor *= 2
    return first, factor * SPLIT_TOKENS


@triton.jit
def is_last(counter, count, LAST_MERGES: tl.constexpr):
    """Whether this program is the last of `count` that ask, and may read what the others wrote before they asked; of
    more than LAST_MERGES none is.

    The counter is zero before the first and, for the next layer and a recording's next replay, after the last.
    """
    # One thread counts, once all have written.
    tl.debug_barrier()
    counted = count <= LAST_MERGES
    last = counted & (tl.atomic_add(counter, 1, mask=counted, sem="acq_rel", scope="gpu") == count - 1)
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def merge_heads(
    output,
    partial,
    log_sums,
    first_slot,  # int64; of the first of GROUP heads
    count,
    num_splits,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The weighted mean of `count` splits of a row's heads, BLOCK_S at a time, in their order: each time one trip to
    memory, since nothing that is read waits for anything else."""
    heads = tl.arange(0, PADDED_GROUP)
    slots = first_slot + heads
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    accumulator = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    for start in range(0, count, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        inside = (splits < count)[:, None] & (heads < GROUP)[None, :]
        places = slots[None, :] * num_splits + splits[:, None]
        log_sum = tl.load(log_sums + places, mask=inside, other=float("-inf"))
        values = tl.load(
            partial + places[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=inside[:, :, None] & is_dim[None, None, :],
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, tl.max(log_sum, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2(maximum - shift)
        weights = tl.exp2(log_sum - shift[None, :])
        accumulator = accumulator * decay[:, None] + tl.sum(values * weights[:, :, None], 0)
        total = total * decay + tl.sum(weights, 0)
        maximum = new_maximum
    accumulator = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    mask = (heads < GROUP)[:, None] & is_dim[None, :]
    tl.store(output + slots[:, None] * HEAD_DIM + dims[None, :], accumulator.to(output.dtype.element_ty), mask=mask)


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
    LAST_MERGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (row, head): the weighted mean of the row's splits, BLOCK_S of them at a time, in their order; where they
    are more than LAST_MERGES, else they are merged already."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    slot = row * NUM_HEADS + tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    mask = dims < HEAD_DIM
    kv_length = tl.load(kv_lengths + row)
    first, split_tokens = splits_of(kv_length, window, SPLIT_TOKENS, MOST_SPLITS, HAS_WINDOW)
    count = tl.cdiv(kv_length - first, split_tokens)
    if count <= LAST_MERGES:
        return
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
