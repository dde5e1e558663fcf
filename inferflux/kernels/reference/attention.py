"""Causal attention over a paged context (Vaswani et al. 2017, arXiv 1706.03762, equation 1), one row at a time."""

import torch

from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.quantized_kv import as_bytes, dequantize, is_quantized

Tensor = torch.Tensor


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
    wide = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    first = 0
    for row, (num_queries, length) in enumerate(
        zip(metadata.query_lengths_host, metadata.kv_lengths_host, strict=True)
    ):
        tokens = slice(first, first + num_queries)
        key, value = _row_context(kv_pages, metadata.page_table[row], length, wide)
        scores = _scores(query[tokens].to(wide), key.to(wide)) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~_visible(metadata.positions[tokens], length, window), float("-inf"))
        output[tokens] = _mix(torch.softmax(scores, dim=-1), value.to(wide)).to(query.dtype)
        first += num_queries
    return output


def _row_context(kv_pages: Tensor, pages: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the row's keys and values in order of position, [length, K, D] each."""
    own = pages[: -(-length // kv_pages.shape[2])].long()
    own_pages = dequantize(as_bytes(kv_pages)[own], kv_pages.dtype, dtype) if is_quantized(kv_pages) else kv_pages[own]
    key, value = (own_pages[:, which].flatten(0, 1)[:length] for which in (0, 1))
    return key, value


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """[queries, length]: which positions each query sees."""
    distance = positions.unsqueeze(1) - torch.arange(length, device=positions.device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """query [Q, H, D], key [L, K, D] -> [H, Q, L]: H / K query heads share a key head."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("qhd,lhd->hql", query, key)


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """weights [H, Q, L], value [L, K, D] -> [Q, H, D]."""
    value = value.repeat_interleave(weights.shape[0] // value.shape[1], dim=1)
    return torch.einsum("hql,lhd->qhd", weights, value)
