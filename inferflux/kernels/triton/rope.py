"""Rotary embedding and the KV write in one launch: queries rotate into the output, keys into their pages.

Rotary position embedding after Su et al., "RoFormer" (arXiv 2104.09864), in the half-split layout.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rope_kernel(
    output,
    qkv,
    cos,
    sin,
    kv_pages,
    slots,
    stride_token,
    stride_head,
    stride_cos,
    stride_page,
    stride_value,
    stride_slot,
    stride_kv_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, head): head < NUM_HEADS a query, then the keys, then the values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    mask = dims < HEAD_DIM
    source = qkv + token * stride_token + head * stride_head
    values = tl.load(source + dims, mask=mask, other=0.0)
    if ROTARY_DIM > 0 and head < NUM_HEADS + NUM_KV_HEADS:
        HALF: tl.constexpr = ROTARY_DIM // 2
        rotary = dims < ROTARY_DIM
        partner = tl.load(source + tl.where(dims < HALF, dims + HALF, dims - HALF), mask=rotary, other=0.0)
        sign = tl.where(dims < HALF, -1.0, 1.0)
        angle_cos = tl.load(cos + token * stride_cos + dims, mask=rotary, other=1.0).to(tl.float32)
        angle_sin = tl.load(sin + token * stride_cos + dims, mask=rotary, other=0.0).to(tl.float32)
        rotated = values.to(tl.float32) * angle_cos + sign * partner.to(tl.float32) * angle_sin
        values = rotated.to(values.dtype)
    if head < NUM_HEADS:
        tl.store(output + (token * NUM_HEADS + head) * HEAD_DIM + dims, values, mask=mask)
    else:
        kv_index = head - NUM_HEADS
        is_value = kv_index // NUM_KV_HEADS
        slot = tl.load(slots + token)
        target = slot // PAGE_TOKENS * stride_page + slot % PAGE_TOKENS * stride_slot
        target += is_value * stride_value + kv_index % NUM_KV_HEADS * stride_kv_head
        tl.store(kv_pages + target + dims, values.to(kv_pages.dtype.element_ty), mask=mask)


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
) -> torch.Tensor:
    """See `ops.RopeOp`."""
    num_tokens, all_heads, head_dim = qkv.shape
    rotary_dim = 0 if cos is None else cos.shape[-1]
    output = qkv.new_empty((num_tokens, num_heads, head_dim))
    # Without rotation the tables are never read; any tensor serves as the pointer.
    cos_table, sin_table = (qkv, qkv) if cos is None or sin is None else (cos, sin)
    assert cos_table.stride(0) == sin_table.stride(0)
    _rope_kernel[(num_tokens, all_heads)](
        output, qkv, cos_table, sin_table, kv_pages, slots,
        qkv.stride(0), qkv.stride(1), cos_table.stride(0),
        kv_pages.stride(0), kv_pages.stride(1), kv_pages.stride(2), kv_pages.stride(3),
        NUM_HEADS=num_heads, NUM_KV_HEADS=kv_pages.shape[3], HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim,
        PAGE_TOKENS=kv_pages.shape[2], BLOCK=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return output
