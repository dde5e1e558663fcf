"""Paged attention by torch's fused attention over gathered pages; rows that decode apart from rows that prefill.

A row's context is copied out of its pages once per layer. With a soft cap, which the fused operator lacks, scores are
formed by hand.
"""

from typing import Final

import torch
from torch.nn import functional

from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.quantized_kv import as_bytes, dequantize, is_quantized
from inferflux.kernels.torch.attention_plan import (
    AttentionPlan,
    DecodeGroup,
    Geometry,
    Limits,
    PrefillRow,
    plan_attention,
)

Tensor = torch.Tensor

# ms per layer, 9 query and 3 key heads of 64, float32. 32 rows of 64 to 400 tokens: groups of 1024 padded tokens 3.6,
# 2048 3.0, 4096 3.1, 8192 (without the idle head below) 6.4; of 544 tokens each: 8.0, 5.4, 4.6, 8.0. Chunks of 512
# queries after 512 cached tokens: blocks of 64 queries 17.0, 128 17.2, 256 19.3, 512 21.1. One core of a Zen 3 EPYC
# (AVX2), torch 2.13.
CPU_LIMITS: Final = Limits(decode_tokens=4096, query_block=128)
# Query heads per key head that one idle head more makes faster: 8 rows of 256 tokens, 3 key heads take 293 us with 3
# query heads each and 189 with 4; 327 with 7 and 274 with 8. Same machine (MKL's products of so few rows).
SLOW_GROUPS: Final = frozenset({3, 7})
# Masks and gathered context bounded; launches are what costs. Not measured: the fallback where Triton is missing.
ACCELERATOR_LIMITS: Final = Limits(decode_tokens=2**17, query_block=1024)


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
    plan, dtype = _plan(query, kv_pages, metadata, window, soft_cap)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide_query = query.to(dtype)
    for group in plan.groups:
        _decode(output, wide_query, kv_pages, group, scale, soft_cap)
    for row in plan.rows:
        _prefill(output, wide_query, kv_pages, row, scale, soft_cap)
    return output


def _plan(
    query: Tensor,
    kv_pages: Tensor,
    metadata: AttentionMetadata,
    window: int | None,
    soft_cap: float | None,
) -> tuple[AttentionPlan, torch.dtype]:
    """Returns the step's plan and the type to compute in."""
    on_cpu = query.device.type == "cpu"
    # 16-bit products are slow on CPUs (see `linear`), and attention's are small: widened context stays in the cache.
    dtype = torch.promote_types(query.dtype, torch.float32) if on_cpu else query.dtype
    limits = CPU_LIMITS if on_cpu else ACCELERATOR_LIMITS
    geometry = Geometry(kv_pages.shape[2], window, dtype, limits, fused=soft_cap is None)
    return plan_attention(metadata, geometry), dtype


def _decode(
    output: Tensor, query: Tensor, kv_pages: Tensor, group: DecodeGroup, scale: float, soft_cap: float | None
) -> None:
    """Query heads that share a key head stand as its queries: [n, K, H / K, D] against [n, K, slots, D]."""
    num_rows, num_kv_heads, head_dim = len(group.tokens), kv_pages.shape[3], query.shape[2]
    context = (num_rows, -1, num_kv_heads, head_dim)
    seen = slice(group.start, group.stop)
    key = _gather(kv_pages[:, 0], group.pages, group.hidden, query.dtype).view(context)[:, seen].transpose(1, 2)
    value = _gather(kv_pages[:, 1], group.pages, group.hidden, query.dtype).view(context)[:, seen].transpose(1, 2)
    heads = query.index_select(0, group.tokens).view(num_rows, num_kv_heads, -1, head_dim)
    num_shared = heads.shape[2]
    if soft_cap is not None:
        mixed = _capped_attention(heads * scale, key, value, group.mask, soft_cap)
    else:
        if num_shared in SLOW_GROUPS:
            heads = functional.pad(heads, (0, 0, 0, 1))
        mixed = functional.scaled_dot_product_attention(heads, key, value, group.mask, scale=scale)[:, :, :num_shared]
    output.index_copy_(0, group.tokens, mixed.reshape(num_rows, -1, head_dim).to(output.dtype))


def _prefill(
    output: Tensor, query: Tensor, kv_pages: Tensor, row: PrefillRow, scale: float, soft_cap: float | None
) -> None:
    """Key heads stand as the batch and the query heads that share one as its heads: [K, H / K, queries, D]."""
    num_kv_heads, head_dim = kv_pages.shape[3], query.shape[2]
    context = [_gather(kv_pages[:, which], row.pages, None, query.dtype).transpose(0, 1) for which in (0, 1)]
    for block in row.blocks:
        shape = (block.last - block.first, num_kv_heads, -1, head_dim)
        heads = query[block.first : block.last].view(shape).permute(1, 2, 0, 3)
        key, value = (part[:, block.start : block.stop] for part in context)
        if soft_cap is None:
            key, value = (part.unsqueeze(1).expand(-1, heads.shape[1], -1, -1) for part in (key, value))
            mixed = functional.scaled_dot_product_attention(
                heads, key, value, block.mask, is_causal=block.mask is None, scale=scale
            )
        else:
            assert block.mask is not None
            mask = block.mask.repeat(heads.shape[1], 1)
            mixed = _capped_attention(heads.flatten(1, 2) * scale, key, value, mask, soft_cap).view(heads.shape)
        output[block.first : block.last].view(shape).copy_(mixed.permute(2, 0, 1, 3))


def _gather(pages_of_layer: Tensor, pages: Tensor, hidden: Tensor | None, dtype: torch.dtype) -> Tensor:
    """pages_of_layer [P, N, K, D], or quantised -> [pages * N, K, D], hidden slots zeroed: a mask stops no NaN."""
    if is_quantized(pages_of_layer):
        rows = as_bytes(pages_of_layer).index_select(0, pages).flatten(0, 1)
        context = dequantize(rows, pages_of_layer.dtype, dtype)
    else:
        context = pages_of_layer.index_select(0, pages).flatten(0, 1)
    if hidden is not None:
        context.index_fill_(0, hidden, 0)
    return context.to(dtype)


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, soft_cap: float) -> Tensor:
    """Attention with scores squashed to +-soft_cap (Gemma 2, arXiv 2408.00118, section 2)."""
    scores = torch.matmul(query, key.transpose(-1, -2)).div_(soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(torch.softmax(scores, dim=-1), value)
