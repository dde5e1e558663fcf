"""Runs a decoder over whole prompts through a paged pool, the way the runner does, without the runner.

Pages are dealt in shuffled order and start full of large numbers, so that a wrong page, slot or length shows.
"""

import torch

from inferflux.engine.models.decoder import Decoder
from inferflux.kernels.metadata import AttentionMetadata

PAGE_TOKENS = 16


def paged_logits(decoder: Decoder, prompts: list[list[int]], chunks: list[int]) -> list[torch.Tensor]:
    """Computes all prompts together, `chunks[i]` tokens of prompt i per step. Returns logits [len(prompt), V] each."""
    table, pool = _deal_pages(decoder, prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        rows = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]
        spans = {i: (done[i], min(done[i] + chunks[i], len(prompts[i]))) for i in rows}
        token_ids = torch.tensor([token for i in rows for token in prompts[i][slice(*spans[i])]])
        metadata = step_metadata(list(spans.values()), table[rows])
        result = decoder.forward(token_ids, metadata, pool, torch.arange(len(token_ids)))
        for i, part in zip(rows, result.split([stop - start for start, stop in spans.values()]), strict=True):
            logits[i].append(part.clone())
            done[i] = spans[i][1]
    return [torch.cat(parts) for parts in logits]


def step_metadata(spans: list[tuple[int, int]], page_table: torch.Tensor) -> AttentionMetadata:
    """spans: the positions [start, stop) each row computes. page_table: int32 [rows, pages]."""
    lengths = [stop - start for start, stop in spans]
    positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(lengths))
    pages = page_table[rows, positions // PAGE_TOKENS].long()
    return AttentionMetadata(
        query_starts=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        kv_lengths=torch.tensor([stop for _, stop in spans], dtype=torch.int32),
        page_table=page_table,
        slots=pages * PAGE_TOKENS + positions % PAGE_TOKENS,
        positions=positions,
        query_lengths_host=tuple(lengths),
        kv_lengths_host=tuple(stop for _, stop in spans),
    )


def _deal_pages(decoder: Decoder, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a page table int32 [rows, pages] and a pool with two pages to spare."""
    spec = decoder.spec
    pages_per_row = max(-(-len(prompt) // PAGE_TOKENS) for prompt in prompts)
    num_pages = pages_per_row * len(prompts) + 2
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(len(prompts)))
    table = order[: pages_per_row * len(prompts)].view(len(prompts), pages_per_row).to(torch.int32)
    shape = (num_pages, spec.num_layers, 2, PAGE_TOKENS, spec.num_kv_heads, spec.head_dim)
    return table, torch.full(shape, 1e3, dtype=decoder.dtype)
