"""Paged attention: one kernel for chunks of queries, one split-KV kernel with a merge for single queries.

Both put all query heads of a KV head in one tile, so that each cached key and value is read once (the tiling of
"The Anatomy of a Triton Attention Kernel", arXiv 2511.11581), and both use the online softmax of FlashAttention
(arXiv 2205.14135), in base 2. Decode cuts the context into fixed splits merged by their log-sum-exps (Flash-Decoding).
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.narrow_kv import is_narrow
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.merge import merge_kernel
from inferflux.kernels.triton.narrow import codes_of, scales_of, widened
from inferflux.kernels.triton.sizes import Sizes

LOG2E = tl.constexpr(1.4426950408889634)
# Weights times the scales of narrow values are lifted by so much before they are rounded to 16 bits: float16 would lose
# the last bits of those of values of about a thousandth. A power of two; the largest scale, 65504 / 127, has room.
NARROW_LIFT = tl.constexpr(64.0)
MIN_DOT_ROWS = 16  # tl.dot's smallest tile side
MAX_HEAD_DIM = 256


@triton.jit
def _soft_cap(scores, soft_cap):
    # soft_cap * tanh(scores / soft_cap), by tanh(x) = 2 * sigmoid(2x) - 1, which does not overflow.
    return soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)


@triton.jit
def _tile_step(
    query,  # [M, D]
    query_positions,  # [M]
    accumulator,  # [M, D] float32
    maximum,  # [M] float32, base-2 exponent
    total,  # [M] float32
    tile_start,
    kv_end,
    kv_head_pointer,
    scale_head_pointer,  # the same bytes as float32; read only where pages are narrow
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
    ALL_VISIBLE: tl.constexpr,
):
    """Folds cached tokens tile_start..tile_start+BLOCK_N-1 (below kv_end) into the running softmax.

    ALL_VISIBLE: every query sees every one of them, so that nothing is compared.
    """
    dims = tl.arange(0, PADDED_DIM)
    tokens = tile_start + tl.arange(0, BLOCK_N)
    inside = (tokens < kv_end) | ALL_VISIBLE
    pages = tl.load(page_row_pointer + tokens // PAGE_TOKENS, mask=inside, other=0).to(tl.int64)
    offsets = pages * stride_page + (tokens % PAGE_TOKENS) * stride_slot
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
def _normalised(accumulator, total, IS_NARROW: tl.constexpr):
    """The weighted mean of the values; zeros where nothing was seen."""
    if IS_NARROW:
        accumulator *= 1.0 / NARROW_LIFT
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["num_rows", "window", "stride_table"])
def _chunk_kernel(
    output,
    query,
    kv_pages,
    kv_scales,
    page_table,
    query_starts,
    kv_lengths,
    num_rows,
    stride_output_token,
    stride_output_head,
    stride_query_token,
    stride_query_head,
    stride_page,
    stride_value,
    stride_slot,
    stride_kv_head,
    stride_table,
    scale,
    soft_cap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (block, kv head): BLOCK_M // GROUP query tokens of one row, with all their heads of this KV head."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # The last blocks see most: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)

    # Row i owns blocks from query_starts[i] // BLOCK_Q + i on: never fewer than it needs. Find the last such i.
    low = 0
    high = num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_starts + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle - 1
    row = low
    row_start = tl.load(query_starts + row)
    row_length = tl.load(query_starts + row + 1) - row_start
    first = (block - (row_start // BLOCK_Q + row)) * BLOCK_Q
    if first >= row_length:
        return

    kv_length = tl.load(kv_lengths + row)
    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    tokens = first + lanes // GROUP
    heads = kv_head * GROUP + lanes % GROUP
    in_row = (tokens < row_length) & (lanes < BLOCK_Q * GROUP)
    mask = in_row[:, None] & (dims[None, :] < HEAD_DIM)
    query_offsets = (row_start + tokens).to(tl.int64) * stride_query_token + heads * stride_query_head
    tile = tl.load(query + query_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    positions = kv_length - row_length + tokens

    first_position = kv_length - row_length + first
    kv_end = tl.minimum(first_position + BLOCK_Q, kv_length)
    kv_start = 0

    accumulator = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_WINDOW:
        kv_start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        # Whole tiles up to the first query's own token.
        all_visible_end = (first_position + 1) // BLOCK_N * BLOCK_N
        for tile_start in range(0, all_visible_end, BLOCK_N):
            accumulator, maximum, total = _tile_step(
                tile, positions, accumulator, maximum, total, tile_start, kv_end,
                kv_pages + kv_head * stride_kv_head, kv_scales + kv_head * (stride_kv_head // 4),
                page_table + row.to(tl.int64) * stride_table,
                stride_page, stride_value, stride_slot, scale, soft_cap, window,
                HEAD_DIM, PADDED_DIM, PAGE_TOKENS, BLOCK_N, False, HAS_SOFT_CAP, IS_NARROW, PRECISION, True,
            )  # fmt: skip
        kv_start = all_visible_end
    for tile_start in range(kv_start, kv_end, BLOCK_N):
        accumulator, maximum, total = _tile_step(
            tile, positions, accumulator, maximum, total, tile_start, kv_end,
            kv_pages + kv_head * stride_kv_head, kv_scales + kv_head * (stride_kv_head // 4),
            page_table + row.to(tl.int64) * stride_table,
            stride_page, stride_value, stride_slot, scale, soft_cap, window,
            HEAD_DIM, PADDED_DIM, PAGE_TOKENS, BLOCK_N, HAS_WINDOW, HAS_SOFT_CAP, IS_NARROW, PRECISION, False,
        )  # fmt: skip
    accumulator = _normalised(accumulator, total, IS_NARROW)
    output_offsets = (row_start + tokens).to(tl.int64) * stride_output_token + heads * stride_output_head
    tl.store(output + output_offsets[:, None] + dims[None, :], accumulator.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["window", "stride_table", "num_splits"])
def _split_kernel(
    partial,  # [B, H, S, D] float32, or the output [B, H, D] when S is 1
    log_sums,  # [B, H, S] float32, base 2
    query,
    kv_pages,
    kv_scales,
    page_table,
    kv_lengths,
    num_splits,
    stride_query_row,
    stride_query_head,
    stride_page,
    stride_value,
    stride_slot,
    stride_kv_head,
    stride_table,
    scale,
    soft_cap,
    window,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, kv head, split): the row's single query over one split of its context."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_length = tl.load(kv_lengths + row)
    kv_start = split * SPLIT_TOKENS
    # Launched for longer rows than this one; nobody merges what it does not have.
    if kv_start >= kv_length:
        return
    kv_end = tl.minimum(kv_start + SPLIT_TOKENS, kv_length)
    if HAS_WINDOW:
        kv_start = tl.maximum(kv_start, tl.maximum(kv_length - window, 0) // BLOCK_N * BLOCK_N)

    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    heads = kv_head * GROUP + lanes
    mask = (lanes < GROUP)[:, None] & (dims[None, :] < HEAD_DIM)
    query_offsets = row.to(tl.int64) * stride_query_row + heads * stride_query_head
    tile = tl.load(query + query_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    positions = tl.zeros([BLOCK_M], tl.int32) + kv_length - 1

    accumulator = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile_start in range(kv_start, kv_end, BLOCK_N):
        accumulator, maximum, total = _tile_step(
            tile, positions, accumulator, maximum, total, tile_start, kv_end,
            kv_pages + kv_head * stride_kv_head, kv_scales + kv_head * (stride_kv_head // 4),
            page_table + row.to(tl.int64) * stride_table,
            stride_page, stride_value, stride_slot, scale, soft_cap, window,
            HEAD_DIM, PADDED_DIM, PAGE_TOKENS, BLOCK_N, HAS_WINDOW, HAS_SOFT_CAP, IS_NARROW, PRECISION, False,
        )  # fmt: skip
    empty = total == 0.0
    accumulator = _normalised(accumulator, total, IS_NARROW)
    slots = (row.to(tl.int64) * NUM_HEADS + heads) * num_splits + split
    tl.store(partial + slots[:, None] * HEAD_DIM + dims[None, :], accumulator.to(partial.dtype.element_ty), mask=mask)
    log_sum = tl.where(empty, float("-inf"), maximum + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(log_sums + slots, log_sum, mask=lanes < GROUP)


def attention(
    query: torch.Tensor,
    kv_pages: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sizes: Sizes | None = None,
) -> torch.Tensor:
    """See `ops.AttentionOp`. Steps of single queries take the split-KV path, all others the chunk path.

    sizes: others than this GPU's.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    assert kv_pages.stride(-1) == 1, "a slot's head must be contiguous"
    assert query.shape[-1] <= MAX_HEAD_DIM
    run = _decode if metadata.max_query_length == 1 else _chunks
    sizes = sizes or tuning.sizes_for(query.device, query.dtype)
    return run(query, kv_pages, metadata, sizes, scale=scale, window=window, soft_cap=soft_cap)


def _chunks(
    query: torch.Tensor,
    kv_pages: torch.Tensor,
    metadata: AttentionMetadata,
    sizes: Sizes,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_pages.shape[3]
    group = num_heads // num_kv_heads
    padded_dim = max(triton.next_power_of_2(head_dim), MIN_DOT_ROWS)
    tile = tuning.attention_tile(sizes.prefill, padded_dim, group, query.dtype, tuning.gpu_of(query.device))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    grid = (num_tokens // (tile.block_m // group) + metadata.num_rows, num_kv_heads)
    _chunk_kernel[grid](
        output, query, codes_of(kv_pages), scales_of(kv_pages), metadata.page_table, metadata.query_starts,
        metadata.kv_lengths, metadata.num_rows,
        output.stride(0), output.stride(1), query.stride(0), query.stride(1),
        kv_pages.stride(0), kv_pages.stride(1), kv_pages.stride(2), kv_pages.stride(3), metadata.page_table.stride(0),
        scale, soft_cap or 0.0, window or 0,
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PAGE_TOKENS=kv_pages.shape[2],
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None,
        IS_NARROW=is_narrow(kv_pages), PRECISION=_precision(query.dtype), num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return output


def _decode(
    query: torch.Tensor,
    kv_pages: torch.Tensor,
    metadata: AttentionMetadata,
    sizes: Sizes,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = kv_pages.shape[3]
    group = num_heads // num_kv_heads
    padded_dim = max(triton.next_power_of_2(head_dim), MIN_DOT_ROWS)
    tile = tuning.attention_tile(sizes.decode, padded_dim, group, query.dtype, tuning.gpu_of(query.device))
    split = tuning.listed(sizes.splits, padded_dim)
    num_splits = triton.cdiv(metadata.max_kv_length, split.tokens)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial = output
    if num_splits > 1:
        partial = query.new_empty((num_rows, num_heads, num_splits, head_dim), dtype=torch.float32)
    log_sums = query.new_empty((num_rows, num_heads, num_splits), dtype=torch.float32)
    _split_kernel[(num_rows, num_kv_heads, num_splits)](
        partial, log_sums, query, codes_of(kv_pages), scales_of(kv_pages), metadata.page_table, metadata.kv_lengths,
        num_splits, query.stride(0), query.stride(1),
        kv_pages.stride(0), kv_pages.stride(1), kv_pages.stride(2), kv_pages.stride(3), metadata.page_table.stride(0),
        scale, soft_cap or 0.0, window or 0,
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PAGE_TOKENS=kv_pages.shape[2],
        SPLIT_TOKENS=split.tokens, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None, IS_NARROW=is_narrow(kv_pages),
        PRECISION=_precision(query.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if num_splits > 1:
        merge_kernel[(num_rows, num_heads)](
            output, partial, log_sums, metadata.kv_lengths, num_splits,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, SPLIT_TOKENS=split.tokens,
            BLOCK_S=split.merged,
        )  # fmt: skip
    return output


def _precision(dtype: torch.dtype) -> str:
    """float32 inputs mean float32 arithmetic: tf32 would lose 13 bits in silence."""
    return "ieee" if dtype == torch.float32 else "tf32"
