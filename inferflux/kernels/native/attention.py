"""Paged attention without gathering pages; shapes that the kernel does not cover go to the torch backend."""

import torch

from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.native.calls import ATTENTION, TYPES, call, expect_same
from inferflux.kernels.native.pages import fits
from inferflux.kernels.torch import attention as fallback

Tensor = torch.Tensor
MAX_HEAD_DIM = 256
MAX_GROUP = 16


def attention(
    query: Tensor,
    kv_pages: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See `ops.AttentionOp`."""
    num_heads, num_kv_heads, head_dim = query.shape[1], kv_pages.shape[3], query.shape[2]
    strides = kv_pages.stride()
    if not fits(kv_pages, query) or scale <= 0 or head_dim > MAX_HEAD_DIM or num_heads // num_kv_heads > MAX_GROUP:
        return fallback.attention(query, kv_pages, metadata, scale=scale, window=window, soft_cap=soft_cap)
    expect_same("tokens of the queries", query.shape[0], metadata.num_tokens)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if metadata.num_rows:
        table = metadata.page_table
        call(
            ATTENTION,
            TYPES[kv_pages.dtype],
            (output, query, kv_pages, table, metadata.kv_lengths, metadata.query_starts),
            query.stride(0),
            *strides[:3],
            table.stride(0),
            metadata.num_rows,
            num_heads,
            num_kv_heads,
            head_dim,
            kv_pages.shape[2],
            window or 0,
            scale,
            soft_cap or 0.0,
            TYPES[query.dtype],
        )
    return output
