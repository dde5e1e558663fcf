"""Rotary embedding and the KV write in one launch: queries rotate into the output, keys into their pages.

Rotary position embedding after Su et al., "RoFormer" (arXiv 2104.09864), in the half-split layout.
"""

import torch
import triton
import triton.language as tl

from inferflux.kernels import quantized_kv
from inferflux.kernels.quantized_kv import LARGEST_CODE
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.codes import codes_of, rounded_to_float8, scales_of
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.triton.start import begin

SMALLEST = tl.constexpr(quantized_kv.SMALLEST)


@triton.jit
def _rope_kernel(
    output,
    qkv,
    cos,
    sin,
    kv_pages,
    kv_scales,  # the same bytes as float32; written only where pages are quantised
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
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token, block of heads): heads below NUM_HEADS are queries, then come the keys, then the values."""
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)  # before anything is written, else it waits for what that waits for
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    sources = qkv + token * stride_token + heads[:, None] * stride_head
    values = tl.load(sources + dims[None, :], mask=inside, other=0.0)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        rotary = dims < ROTARY_DIM
        turns = inside & rotary[None, :] & (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
        partners = tl.where(dims < HALF, dims + HALF, dims - HALF)
        partner = tl.load(sources + partners[None, :], mask=turns, other=0.0)
        sign = tl.where(dims < HALF, -1.0, 1.0)
        angle_cos = tl.load(cos + token * stride_cos + dims, mask=rotary, other=1.0).to(tl.float32)
        angle_sin = tl.load(sin + token * stride_cos + dims, mask=rotary, other=0.0).to(tl.float32) * sign
        rotated = values.to(tl.float32) * angle_cos[None, :] + partner.to(tl.float32) * angle_sin[None, :]
        values = tl.where(turns, rotated.to(values.dtype), values)
    is_query = (heads < NUM_HEADS)[:, None]
    targets = output + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM
    tl.store(targets + dims[None, :], values, mask=inside & is_query)
    kv_heads = heads - NUM_HEADS
    places = slot // PAGE_TOKENS * stride_page + slot % PAGE_TOKENS * stride_slot
    places += (kv_heads // NUM_KV_HEADS) * stride_value + kv_heads % NUM_KV_HEADS * stride_kv_head
    is_cached = (heads >= NUM_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
    if LARGEST_CODE > 0:
        wide = values.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide), 1), SMALLEST) / LARGEST_CODE
        tl.store(kv_scales + (places + HEAD_DIM) // 4, scale, mask=is_cached)
        codes = wide / scale[:, None]
        if kv_pages.dtype.element_ty == tl.int8:
            # Adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even.
            codes = (codes + 12582912.0) - 12582912.0
        if kv_pages.dtype.element_ty == tl.uint8:
            cached = rounded_to_float8(codes)
        else:
            cached = codes.to(kv_pages.dtype.element_ty)
    else:
        cached = values.to(kv_pages.dtype.element_ty)
    tl.store(kv_pages + places[:, None] + dims[None, :], cached, mask=inside & is_cached[:, None])


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
    sizes: Sizes | None = None,
) -> torch.Tensor:
    """See `ops.RopeOp`. sizes: others than this GPU's."""
    num_tokens, all_heads, head_dim = qkv.shape
    rotary_dim = 0 if cos is None else cos.shape[-1]
    output = qkv.new_empty((num_tokens, num_heads, head_dim))
    # Without rotation the tables are never read; any tensor serves as the pointer.
    cos_table, sin_table = (qkv, qkv) if cos is None or sin is None else (cos, sin)
    assert cos_table.stride(0) == sin_table.stride(0)
    sizes = sizes or tuning.sizes_for(qkv.device, qkv.dtype)
    block = sizes.blocks["rope"]
    block_heads = tuning.rope_heads(block.size, all_heads)
    _rope_kernel[(num_tokens, triton.cdiv(all_heads, block_heads))](
        output, qkv, cos_table, sin_table, codes_of(kv_pages), scales_of(kv_pages), slots,
        qkv.stride(0), qkv.stride(1), cos_table.stride(0),
        kv_pages.stride(0), kv_pages.stride(1), kv_pages.stride(2), kv_pages.stride(3),
        NUM_HEADS=num_heads, NUM_KV_HEADS=kv_pages.shape[3], HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim,
        PAGE_TOKENS=kv_pages.shape[2], BLOCK_HEADS=block_heads, BLOCK_DIM=triton.next_power_of_2(head_dim),
        LARGEST_CODE=LARGEST_CODE.get(kv_pages.dtype, 0.0), num_warps=block.num_warps,
        **tuning.start_of(sizes, qkv.device),
    )  # fmt: skip
    return output
