"""Triton's reading and writing of pages of 8 bits beside the reference's, on any device or under the interpreter."""

from collections.abc import Iterator
from typing import Any

import torch

from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.narrow_kv import as_bytes, narrow
from inferflux.kernels.reference.attention import attention as reference_attention
from inferflux.kernels.reference.rope import rope as reference_rope

STEPS = {"decode": ((39, 40), (0, 1), (599, 600)), "prefill": ((0, 9), (30, 44))}
KINDS = (torch.int8, torch.float8_e4m3fn)
# Share of codes that may be the neighbour's: those on the edge between two, which rounding of the scale moves.
EDGES = 0.01


def compare(device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields by step and kind: other_codes, the share of written codes that differ; error, of attention over the same
    pages."""
    from inferflux.kernels.triton.attention import attention
    from inferflux.kernels.triton.rope import rope

    for name, spans in STEPS.items():
        for kind in KINDS:
            draw = Draw(torch.float32, device, torch.Generator().manual_seed(0))
            paging = Paging(spans)
            metadata = paging.metadata(draw)
            filled = narrow(draw.normal(paging.num_pages, 3, 2, paging.page_tokens, 2, 64), kind)
            angles = draw.normal(paging.num_tokens, 32).repeat(1, 2)
            qkv = draw.normal(paging.num_tokens, 10, 64)
            pools = []
            for write in (reference_rope, rope):
                pages = filled.clone().view(kind)[:, 1]
                query = write(qkv.clone(), angles.cos(), angles.sin(), pages, metadata.slots, num_heads=6)
                pools.append(pages)
            read = [
                op(query, pools[0], metadata, scale=0.2, window=None, soft_cap=None)
                for op in (reference_attention, attention)
            ]
            num_other = int((as_bytes(pools[0]) != as_bytes(pools[1])).sum())
            other = num_other / (paging.num_tokens * 2 * 2 * 64)
            error = float((read[0] - read[1]).abs().max())
            ok = other <= EDGES and error <= 1e-4
            yield f"8-bit pages, {name}, {kind}", {"ok": ok, "other_codes": other, "error": error}
