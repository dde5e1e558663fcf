"""Paged attention: one kernel for chunks of queries, one split-KV kernel with a merge for single queries.

Both put all query heads of a KV head in one tile, so that each cached key and value is read once (the tiling of
"The Anatomy of a Triton Attention Kernel", arXiv 2511.11581), and both use the online softmax of FlashAttention
(arXiv 2205.14135), in base 2. Decode cuts the context into fixed splits merged by their log-sum-exps (Flash-Decoding).
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.quantized_kv import is_quantized
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.codes import codes_of, scales_of
from inferflux.kernels.triton.merge import is_last, merge_heads, merge_kernel, splits_of
from inferflux.kernels.triton.paged_softmax import fold, normalised
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.triton.start import begin

MIN_DOT_ROWS = 16  # tl.dot's smallest tile side
MAX_HEAD_DIM = 256


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
    stride_table,
    scale,
    soft_cap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_VALUE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    STRIDE_KV_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGES_AHEAD: tl.constexpr,
):
    """Program (block, kv head): BLOCK_M // GROUP query tokens of one row, with all their heads of this KV head."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    ON_PAGES: tl.constexpr = BLOCK_N % PAGE_TOKENS == 0
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
        accumulator, maximum, total = fold(
            tile, positions, accumulator, maximum, total, 0, all_visible_end, kv_end,
            kv_pages + kv_head * STRIDE_KV_HEAD, kv_scales + kv_head * (STRIDE_KV_HEAD // 4),
            page_table + row.to(tl.int64) * stride_table,
            scale, soft_cap, window,
            HEAD_DIM, PADDED_DIM, PAGE_TOKENS, STRIDE_PAGE, STRIDE_VALUE, STRIDE_SLOT, BLOCK_N,
            False, HAS_SOFT_CAP, IS_QUANTIZED, PRECISION, PAGES_AHEAD, ON_PAGES, True, True,
        )  # fmt: skip
        kv_start = all_visible_end
    accumulator, maximum, total = fold(
        tile, positions, accumulator, maximum, total, kv_start, kv_end, kv_end,
        kv_pages + kv_head * STRIDE_KV_HEAD, kv_scales + kv_head * (STRIDE_KV_HEAD // 4),
        page_table + row.to(tl.int64) * stride_table,
        scale, soft_cap, window,
        HEAD_DIM, PADDED_DIM, PAGE_TOKENS, STRIDE_PAGE, STRIDE_VALUE, STRIDE_SLOT, BLOCK_N,
        HAS_WINDOW, HAS_SOFT_CAP, IS_QUANTIZED, PRECISION, PAGES_AHEAD, ON_PAGES, True, False,
    )  # fmt: skip
    accumulator = normalised(accumulator, total, IS_QUANTIZED)
    output_offsets = (row_start + tokens).to(tl.int64) * stride_output_token + heads * stride_output_head
    tl.store(output + output_offsets[:, None] + dims[None, :], accumulator.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["window", "stride_table", "num_splits"])
def _split_kernel(
    output,  # [B, H, D]
    partial,  # [B, H, S, D] float32, or the output when S is 1
    log_sums,  # [B, H, S] float32, base 2
    counters,  # int32 [B, K]; where LAST_MERGES
    query,
    kv_pages,
    kv_scales,
    page_table,
    kv_lengths,
    num_splits,
    stride_query_row,
    stride_query_head,
    stride_table,
    scale,
    soft_cap,
    window,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_VALUE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    STRIDE_KV_HEAD: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    LAST_MERGES: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGES_AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (row, kv head, split): the row's single query over one split of its context.

    LAST_MERGES: the most splits of a row that the last of its programs merges.
    """
    begin(EARLY)
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_length = tl.load(kv_lengths + row)
    first, split_tokens = splits_of(kv_length, window, SPLIT_TOKENS, MOST_SPLITS, HAS_WINDOW)
    kv_start = first + split * split_tokens
    # Launched for longer rows than this one; nobody merges what it does not have.
    if kv_start >= kv_length:
        return
    kv_end = tl.minimum(kv_start + split_tokens, kv_length)

    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    heads = kv_head * GROUP + lanes
    mask = (lanes < GROUP)[:, None] & (dims[None, :] < HEAD_DIM)
    query_offsets = row.to(tl.int64) * stride_query_row + heads * stride_query_head
    tile = tl.load(query + query_offsets[:, None] + dims[None, :], mask=mask, other=0.0)

    accumulator = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A window's splits begin where it does, which may be within a page; so may others where pages are longer.
    ON_PAGES: tl.constexpr = BLOCK_N % PAGE_TOKENS == 0 and SPLIT_TOKENS % PAGE_TOKENS == 0 and not HAS_WINDOW
    accumulator, maximum, total = fold(
        tile, lanes, accumulator, maximum, total, kv_start, kv_end, kv_end,
        kv_pages + kv_head * STRIDE_KV_HEAD, kv_scales + kv_head * (STRIDE_KV_HEAD // 4),
        page_table + row.to(tl.int64) * stride_table,
        scale, soft_cap, window,
        HEAD_DIM, PADDED_DIM, PAGE_TOKENS, STRIDE_PAGE, STRIDE_VALUE, STRIDE_SLOT, BLOCK_N,
        False, HAS_SOFT_CAP, IS_QUANTIZED, PRECISION, PAGES_AHEAD, ON_PAGES, False, False,
    )  # fmt: skip
    total = tl.sum(total, 1)
    accumulator = normalised(accumulator, total, IS_QUANTIZED)
    row_slot = row.to(tl.int64) * NUM_HEADS
    count = tl.cdiv(kv_length - first, split_tokens)
    if LAST_MERGES > 0 and count == 1:
        slots = row_slot + heads
        tl.store(output + slots[:, None] * HEAD_DIM + dims[None, :], accumulator.to(output.dtype.element_ty), mask=mask)
        return
    slots = (row_slot + heads) * num_splits + split
    tl.store(partial + slots[:, None] * HEAD_DIM + dims[None, :], accumulator.to(partial.dtype.element_ty), mask=mask)
    tl.store(log_sums + slots, maximum + tl.log2(total), mask=lanes < GROUP)
    if LAST_MERGES > 0 and is_last(counters + row * (NUM_HEADS // GROUP) + kv_head, count, LAST_MERGES):
        merge_heads(
            output, partial, log_sums, row_slot + kv_head * GROUP, count, num_splits,
            GROUP, PADDED_GROUP, HEAD_DIM, PADDED_DIM, MERGED,
        )  # fmt: skip


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
    listed = tuning.listed(sizes.prefill, padded_dim)
    tile = tuning.attention_tile(listed, padded_dim, group, query.dtype, tuning.gpu_of(query.device))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    grid = (num_tokens // (tile.block_m // group) + metadata.num_rows, num_kv_heads)
    _chunk_kernel[grid](
        output, query, codes_of(kv_pages), scales_of(kv_pages), metadata.page_table, metadata.query_starts,
        metadata.kv_lengths, metadata.num_rows,
        output.stride(0), output.stride(1), query.stride(0), query.stride(1), metadata.page_table.stride(0),
        scale, soft_cap or 0.0, window or 0,
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, **_page_sizes(kv_pages),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None,
        IS_QUANTIZED=is_quantized(kv_pages), PRECISION=_precision(query.dtype), PAGES_AHEAD=tile.pages_ahead,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
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
    start = tuning.start_of(sizes, query.device)
    listed = tuning.listed(sizes.decode, padded_dim)
    split = listed.split
    tile = tuning.attention_tile(listed.tile, padded_dim, group, query.dtype, tuning.gpu_of(query.device))
    num_splits = min(triton.cdiv(min(metadata.max_kv_length, window or 2**31), split.tokens), split.most)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial = output
    if num_splits > 1:
        partial = query.new_empty((num_rows, num_heads, num_splits, head_dim), dtype=torch.float32)
    log_sums = query.new_empty((num_rows, num_heads, num_splits), dtype=torch.float32)
    counters = _counters(metadata, num_kv_heads, query.device) if split.last_merges else log_sums
    padded_group = triton.next_power_of_2(group)
    _split_kernel[(num_rows, num_kv_heads, num_splits)](
        output, partial, log_sums, counters, query, codes_of(kv_pages), scales_of(kv_pages), metadata.page_table,
        metadata.kv_lengths, num_splits, query.stride(0), query.stride(1), metadata.page_table.stride(0),
        scale, soft_cap or 0.0, window or 0,
        NUM_HEADS=num_heads, GROUP=group, PADDED_GROUP=padded_group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
        **_page_sizes(kv_pages), SPLIT_TOKENS=split.tokens, MOST_SPLITS=split.most,
        LAST_MERGES=split.last_merges, MERGED=max(1, 64 * 32 * tile.num_warps // (padded_group * padded_dim)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None, IS_QUANTIZED=is_quantized(kv_pages),
        PRECISION=_precision(query.dtype), PAGES_AHEAD=tile.pages_ahead,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        maxnreg=None if is_quantized(kv_pages) else tile.registers or None, **start,
    )  # fmt: skip
    if num_splits > max(split.last_merges, 1):
        merge_kernel[(num_rows, num_heads)](
            output, partial, log_sums, metadata.kv_lengths, num_splits, window or 0,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, SPLIT_TOKENS=split.tokens,
            MOST_SPLITS=split.most, LAST_MERGES=split.last_merges, HAS_WINDOW=window is not None,
            BLOCK_S=split.merged, **start,
        )  # fmt: skip
    return output


def _page_sizes(kv_pages: torch.Tensor) -> dict[str, int]:
    """Sizes of the model, which the compiler may know: none depends on how many pages there are."""
    page, value, slot, kv_head, _ = kv_pages.stride()
    strides = {"STRIDE_PAGE": page, "STRIDE_VALUE": value, "STRIDE_SLOT": slot, "STRIDE_KV_HEAD": kv_head}
    return {"PAGE_TOKENS": kv_pages.shape[2], **strides}


def _counters(metadata: AttentionMetadata, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """One per row and KV head, for all layers of the step, one after another. The step's own, so that steps on other
    streams have others; a recorded step's are made when it is run to get ready for its recording."""
    key = ("splits that are done", num_kv_heads)
    if key not in metadata.derived:
        metadata.derived[key] = torch.zeros(metadata.num_rows * num_kv_heads, dtype=torch.int32, device=device)
    counters: torch.Tensor = metadata.derived[key]
    return counters


def _precision(dtype: torch.dtype) -> str:
    """float32 inputs mean float32 arithmetic: tf32 would lose 13 bits in silence."""
    return "ieee" if dtype == torch.float32 else "tf32"
