"""The inner loop of attention: cached tokens, tile after tile out of their pages, folded into a running softmax.

The online softmax of FlashAttention (arXiv 2205.14135), in base 2. Knows no rows and no splits.
"""

import triton
import triton.language as tl

from inferflux.kernels.triton.narrow import widened

LOG2E = tl.constexpr(1.4426950408889634)
# Weights times the scales of narrow values are lifted by so much before they are rounded to 16 bits: float16 would lose
# the last bits of those of values of about a thousandth. A power of two; the largest scale, 65504 / 127, has room.
NARROW_LIFT = tl.constexpr(64.0)


@triton.jit
def _soft_cap(scores, soft_cap):
    # soft_cap * tanh(scores / soft_cap), by tanh(x) = 2 * sigmoid(2x) - 1, which does not overflow.
    return soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)


@triton.jit
def _pages_of(
    page_row_pointer, tile_start, kv_end, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, ALL_INSIDE: tl.constexpr
):
    """The page number of each of the tile's tokens."""
    tokens = tile_start + tl.arange(0, BLOCK_N)
    return tl.load(page_row_pointer + tokens // PAGE_TOKENS, mask=(tokens < kv_end) | ALL_INSIDE, other=0)


@triton.jit
def _tile_step(
    query,  # [M, D]
    query_positions,  # [M]
    accumulator,  # [M, D] float32
    maximum,  # [M] float32, base-2 exponent
    total,  # [M] float32
    pages,  # [BLOCK_N]
    tile_start,
    kv_end,
    kv_head_pointer,
    scale_head_pointer,  # the same bytes as float32; read only where pages are narrow
    stride_page,
    stride_value,
    stride_slot,
    qk_scale,
    soft_cap,
    window,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):
    """Folds cached tokens tile_start..tile_start+BLOCK_N-1 (below kv_end) into the running softmax.

    ALL_VISIBLE: every query sees every one of them, so that nothing is compared.
    """
    dims = tl.arange(0, PADDED_DIM)
    tokens = tile_start + tl.arange(0, BLOCK_N)
    inside = (tokens < kv_end) | ALL_VISIBLE
    offsets = pages.to(tl.int64) * stride_page + (tokens % PAGE_TOKENS) * stride_slot
    pointers = kv_head_pointer + offsets[:, None] + dims[None, :]
    if ALL_VISIBLE and HEAD_DIM == PADDED_DIM:
        key = widened(tl.load(pointers), query.dtype)
        value = widened(tl.load(pointers + stride_value), query.dtype)
    else:
        mask = inside[:, None] & (dims[None, :] < HEAD_DIM)
        key = widened(tl.load(pointers, mask=mask, other=0.0), query.dtype)
        value = widened(tl.load(pointers + stride_value, mask=mask, other=0.0), query.dtype)

    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if IS_NARROW:
        # A head's scale lies behind its codes. Codes are exact in 16 bits; scales multiply in float32.
        scale_pointers = scale_head_pointer + (offsets + HEAD_DIM) // 4
        scores *= tl.load(scale_pointers, mask=inside, other=0.0)[None, :]
    if HAS_SOFT_CAP:
        scores = _soft_cap(scores * qk_scale, soft_cap)
        base_2_scale = LOG2E
    else:
        base_2_scale = qk_scale * LOG2E
    if not ALL_VISIBLE:
        visible = (tokens[None, :] <= query_positions[:, None]) & inside[None, :]
        if HAS_WINDOW:
            visible = visible & (tokens[None, :] > query_positions[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))

    # Scaled as they are shifted, one multiply-add for each: the scale is positive, so the order stays.
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * base_2_scale)
    # A query that has seen nothing yet keeps -inf; subtracting 0 instead of -inf avoids NaN.
    shift = new_maximum if ALL_VISIBLE else tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores * base_2_scale - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, 1)
    if IS_NARROW:
        weights *= tl.load(scale_pointers + stride_value // 4, mask=inside, other=0.0)[None, :] * NARROW_LIFT
    accumulator = accumulator * decay[:, None]
    accumulator += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return accumulator, new_maximum, total


@triton.jit
def fold(
    query,
    query_positions,
    accumulator,
    maximum,
    total,
    first,
    end,
    kv_end,
    kv_head_pointer,
    scale_head_pointer,
    page_row_pointer,
    stride_page,
    stride_value,
    stride_slot,
    qk_scale,
    soft_cap,
    window,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGES_AHEAD: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):
    """Folds cached tokens from `first`, tile after tile up to the one that holds `end` - 1; see `_tile_step`.

    PAGES_AHEAD: page numbers are read a turn before what they lead to. Where one turn reads both, the compiler gives
    each half of the stages; so, all are of keys and values.
    """
    if PAGES_AHEAD:
        pages = _pages_of(page_row_pointer, first, kv_end, PAGE_TOKENS, BLOCK_N, False)
    for tile_start in range(first, end, BLOCK_N):
        if not PAGES_AHEAD:
            pages = _pages_of(page_row_pointer, tile_start, kv_end, PAGE_TOKENS, BLOCK_N, ALL_VISIBLE)
        accumulator, maximum, total = _tile_step(
            query, query_positions, accumulator, maximum, total, pages, tile_start, kv_end,
            kv_head_pointer, scale_head_pointer, stride_page, stride_value, stride_slot, qk_scale, soft_cap, window,
            HEAD_DIM, PADDED_DIM, PAGE_TOKENS, BLOCK_N, HAS_WINDOW, HAS_SOFT_CAP, IS_NARROW, PRECISION, ALL_VISIBLE,
        )  # fmt: skip
        if PAGES_AHEAD:
            pages = _pages_of(page_row_pointer, tile_start + BLOCK_N, kv_end, PAGE_TOKENS, BLOCK_N, False)
    return accumulator, maximum, total


@triton.jit
def normalised(accumulator, total, IS_NARROW: tl.constexpr):
    """The weighted mean of the values; zeros where nothing was seen."""
    if IS_NARROW:
        accumulator *= 1.0 / NARROW_LIFT
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
