"""Rotary embedding in place and the write of keys and values into their pages, in one pass over each token."""

import torch

from inferflux.kernels.native.calls import ROPE, TYPES, call, expect_same
from inferflux.kernels.native.pages import fits
from inferflux.kernels.torch import rope as fallback

Tensor = torch.Tensor


def rope(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, kv_pages: Tensor, slots: Tensor, *, num_heads: int
) -> Tensor:
    """See `ops.RopeOp`. Overwrites qkv and returns a view of it."""
    num_tokens, num_all_heads, head_dim = qkv.shape
    strides = kv_pages.stride()
    if not fits(kv_pages, qkv) or (cos is not None and cos.dtype != qkv.dtype):
        return fallback.rope(qkv, cos, sin, kv_pages, slots, num_heads=num_heads)
    num_kv_heads = (num_all_heads - num_heads) // 2
    expect_same("tokens and key heads of qkv", (num_tokens, num_kv_heads), (len(slots), kv_pages.shape[3]))
    call(
        ROPE,
        TYPES[kv_pages.dtype],
        (qkv, cos, sin, kv_pages, slots),
        qkv.stride(0),
        0 if cos is None else cos.stride(0),
        *strides[:3],
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        0 if cos is None else cos.shape[1],
        kv_pages.shape[2],
        TYPES[qkv.dtype],
    )
    return qkv[:, :num_heads]
