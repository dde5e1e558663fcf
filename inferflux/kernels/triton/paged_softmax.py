"""The inner loop of attention: cached tokens, tile after tile out of their pages, folded into a running softmax.

The online softmax of FlashAttention (arXiv 2205.14135), in base 2. Knows no rows and no splits.
"""

import triton
import triton.language as tl

from inferflux.kernels.triton.codes import widened

LOG2E = tl.constexpr(1.4426950408889634)
# Weights times the scales of quantised values are lifted by so much before they are rounded to 16 bits: float16 would
# lose the last bits of those of values of about a thousandth. A power of two; the largest scale, 65504 / 127, has room.
VALUE_LIFT = tl.constexpr(64.0)


@triton.jit
def _soft_cap(scores, soft_cap):
    # soft_cap * tanh(scores / soft_cap), by tanh(x) = 2 * sigmoid(2x) - 1, which does not overflow.
    return soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)


@triton.jit
def _pages_of(
    page_row_pointer, tile_start, inside, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, ON_PAGES: tl.constexpr
):
    """The page number of each of the tile's tokens that are inside."""
    in_tile = tl.arange(0, BLOCK_N)
    if ON_PAGES:
        pointers = page_row_pointer + tile_start // PAGE_TOKENS + in_tile // PAGE_TOKENS
    else:
        pointers = page_row_pointer + (tile_start + in_tile) // PAGE_TOKENS
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _pages_ahead(
    page_row_pointer,
    tile_start,
    end,
    kv_end,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ON_PAGES: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):
    """The page numbers of a tile that may lie behind the last one."""
    if ALL_VISIBLE:  # whole or none: one comparison for all
        inside = tl.zeros([BLOCK_N], tl.int32) + tile_start < end
    else:
        inside = tl.arange(0, BLOCK_N) < kv_end - tile_start
    return _pages_of(page_row_pointer, tile_start, inside, PAGE_TOKENS, BLOCK_N, ON_PAGES)


@triton.jit
def _tile_step(
    query,  # [M, D]
    query_positions,  # [M]
    accumulator,  # [M, D] float32
    maximum,  # [M] float32, base-2 exponent
    total,  # [M] float32; where not CAUSAL [M, BLOCK_N]
    pages,  # [BLOCK_N]
    tile_start,
    kv_end,
    kv_head_pointer,
    scale_head_pointer,  # the same bytes as float32; read only where pages are quantised
    qk_scale,
    soft_cap,
    window,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_VALUE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    ON_PAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):
    """Folds cached tokens tile_start..tile_start+BLOCK_N-1 (below kv_end) into the running softmax."""
    dims = tl.arange(0, PADDED_DIM)
    in_tile = tl.arange(0, BLOCK_N)
    inside = (in_tile < kv_end - tile_start) | ALL_VISIBLE
    slots = (in_tile if ON_PAGES else tile_start + in_tile) % PAGE_TOKENS
    # What is the same in every iteration first.
    pointers = kv_head_pointer + (slots * STRIDE_SLOT)[:, None] + dims[None, :]
    pointers += (pages.to(tl.int64) * STRIDE_PAGE)[:, None]
    if ALL_VISIBLE and HEAD_DIM == PADDED_DIM:
        key = widened(tl.load(pointers), query.dtype)
        value = widened(tl.load(pointers + STRIDE_VALUE), query.dtype)
    else:
        mask = inside[:, None] & (dims[None, :] < HEAD_DIM)
        key = widened(tl.load(pointers, mask=mask, other=0.0), query.dtype)
        value = widened(tl.load(pointers + STRIDE_VALUE, mask=mask, other=0.0), query.dtype)

    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if IS_QUANTIZED:
        # A head's scale lies behind its codes. Codes are exact in 16 bits; scales multiply in float32.
        scale_pointers = scale_head_pointer + (slots * STRIDE_SLOT + HEAD_DIM) // 4
        scale_pointers += pages.to(tl.int64) * (STRIDE_PAGE // 4)
        scores *= tl.load(scale_pointers, mask=inside, other=0.0)[None, :]
    if HAS_SOFT_CAP:
        scores = _soft_cap(scores * qk_scale, soft_cap)
        base_2_scale = LOG2E
    else:
        base_2_scale = qk_scale * LOG2E
    if not ALL_VISIBLE:
        if CAUSAL:
            last = query_positions - tile_start
            visible = in_tile[None, :] <= last[:, None]
            if HAS_WINDOW:
                visible = visible & (in_tile[None, :] > (last - window)[:, None])
        else:
            visible = inside[None, :]
        scores = tl.where(visible, scores, float("-inf"))

    # Scaled as they are shifted, one multiply-add for each, which Triton will not always make of two operations (3.10
    # stops): the scale is positive, so the order stays.
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * base_2_scale)
    # A query that has seen nothing yet keeps -inf; subtracting 0 instead of -inf avoids NaN.
    shift = new_maximum if ALL_VISIBLE else tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(tl.fma(scores, base_2_scale, -shift[:, None]))
    decay = tl.exp2(maximum - shift)
    # A single query's tile of keys lies across all warps: its columns are summed up once, by the caller, since a sum in
    # every iteration would have all warps meet three times.
    total = total * decay + tl.sum(weights, 1) if CAUSAL else total * decay[:, None] + weights
    if IS_QUANTIZED:
        weights *= tl.load(scale_pointers + STRIDE_VALUE // 4, mask=inside, other=0.0)[None, :] * VALUE_LIFT
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
    qk_scale,
    soft_cap,
    window,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_VALUE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGES_AHEAD: tl.constexpr,
    ON_PAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):
    """Folds cached tokens from `first`, tile after tile up to the one that holds `end` - 1.

    PAGES_AHEAD: page numbers are read an iteration before what they lead to. Where one iteration reads both, the
    compiler gives each half of the stages; so, all are of keys and values. ON_PAGES: every tile is whole pages. CAUSAL:
    a query sees what is not after it, in a window if there is one; else what is below kv_end. ALL_VISIBLE: every query
    sees all of every tile, so that nothing is compared. Strides are sizes of the model, which the compiler may know: it
    then makes a quarter fewer instructions of decode's loop, and reads pages of 8 bits four bytes at a time, not one.
    """
    in_tile = tl.arange(0, BLOCK_N)
    if PAGES_AHEAD:
        pages = _pages_ahead(page_row_pointer, first, end, kv_end, PAGE_TOKENS, BLOCK_N, ON_PAGES, ALL_VISIBLE)
    for tile_start in range(first, end, BLOCK_N):
        if not PAGES_AHEAD:
            inside = (in_tile < kv_end - tile_start) | ALL_VISIBLE
            pages = _pages_of(page_row_pointer, tile_start, inside, PAGE_TOKENS, BLOCK_N, ON_PAGES)
        accumulator, maximum, total = _tile_step(
            query, query_positions, accumulator, maximum, total, pages, tile_start, kv_end,
            kv_head_pointer, scale_head_pointer, qk_scale, soft_cap, window,
            HEAD_DIM, PADDED_DIM, PAGE_TOKENS, STRIDE_PAGE, STRIDE_VALUE, STRIDE_SLOT, BLOCK_N,
            HAS_WINDOW, HAS_SOFT_CAP, IS_QUANTIZED, PRECISION, ON_PAGES, CAUSAL, ALL_VISIBLE,
        )  # fmt: skip
        if PAGES_AHEAD:
            pages = _pages_ahead(
                page_row_pointer, tile_start + BLOCK_N, end, kv_end, PAGE_TOKENS, BLOCK_N, ON_PAGES, ALL_VISIBLE
            )
    return accumulator, maximum, total


@triton.jit
def normalised(accumulator, total, IS_QUANTIZED: tl.constexpr):
    """The weighted mean of the values; zeros where nothing was seen."""
    if IS_QUANTIZED:
        accumulator *= 1.0 / VALUE_LIFT
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
