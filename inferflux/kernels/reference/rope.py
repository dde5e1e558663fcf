"""Rotary embedding (Su et al. 2021, arXiv 2104.09864, equation 34, the halves instead of pairs) and the cache write."""

import torch

from inferflux.kernels.quantized_kv import as_bytes, is_quantized, quantize

Tensor = torch.Tensor


def rope(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, kv_pages: Tensor, slots: Tensor, *, num_heads: int
) -> Tensor:
    """See `ops.RopeOp`."""
    page_tokens, num_kv_heads = kv_pages.shape[2:4]
    query, key, value = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if cos is not None and sin is not None:
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    if is_quantized(kv_pages):
        key, value = quantize(key, kv_pages.dtype), quantize(value, kv_pages.dtype)
        kv_pages = as_bytes(kv_pages)
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, page_tokens)
        kv_pages[page, 0, offset] = key[token]
        kv_pages[page, 1, offset] = value[token]
    return query.clone()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [T, heads, D]; cos, sin [T, R]. Dims R and above stay as they are."""
    wide = torch.promote_types(heads.dtype, torch.float32)
    rotary_dim = cos.shape[-1]
    first, second = heads[..., :rotary_dim].to(wide).chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    straight = torch.cat((first, second), dim=-1)
    rotated = straight * cos.to(wide).unsqueeze(1) + turned * sin.to(wide).unsqueeze(1)
    return torch.cat((rotated.to(heads.dtype), heads[..., rotary_dim:]), dim=-1)
