"""A decoder whose logits depend on every token of the context, read back through the page table and the pool.

It writes token id and position where keys and values would go. A wrong slot, page table, position or logit index
therefore changes its answers, and most trip an assertion first.
"""

import hashlib
from types import SimpleNamespace

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.kv.store.device import PageShape, allocate_pool
from inferflux.kernels.metadata import AttentionMetadata


class FakeDecoder:
    """broken_token: a context that holds it yields NaN logits. refused_token: a batch that holds it raises `error`.
    spec: only vocab_size. num_forwards: how often it was asked.
    most_logits: rows of the largest piece that `logits` was asked for."""

    def __init__(self, vocab_size: int = 50, broken_token: int | None = None) -> None:
        self.spec = SimpleNamespace(vocab_size=vocab_size)
        self.context = ParallelContext(0, 1, torch.device("cpu"))
        self.broken_token = broken_token
        self.most_logits = 0
        self.refused_token: int | None = None
        self.error: Exception = RuntimeError("a kernel failed")
        self.num_forwards = 0

    def make_pool(self, num_pages: int, page_tokens: int) -> torch.Tensor:
        return allocate_pool(num_pages, PageShape(1, page_tokens, 1, 1, torch.float32), torch.device("cpu"))

    def logits_after(self, tokens: list[int]) -> torch.Tensor:
        """[V], what `logits` comes to after this context."""
        if self.broken_token in tokens:
            return torch.full((self.spec.vocab_size,), float("nan"))
        digest = hashlib.sha256(repr(tokens).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return 3 * torch.randn(self.spec.vocab_size, generator=generator)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.most_logits = max(self.most_logits, len(hidden))
        return hidden.clone() if out is None else out.copy_(hidden)

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        metadata: AttentionMetadata,
        kv_pool: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        self.num_forwards += 1
        if self.refused_token in token_ids.tolist():
            raise self.error
        page_tokens = kv_pool.shape[3]
        for token_id, position, slot in zip(
            token_ids.tolist(), metadata.positions.tolist(), metadata.slots.tolist(), strict=True
        ):
            page, offset = divmod(slot, page_tokens)
            kv_pool[page, 0, 0, offset] = token_id
            kv_pool[page, 0, 1, offset] = position
        starts = metadata.query_starts.tolist()
        assert starts[-1] == len(token_ids)
        assert tuple(metadata.kv_lengths.tolist()) == metadata.kv_lengths_host
        logits = [self.logits_after(self._context(index, starts, metadata, kv_pool)) for index in indices.tolist()]
        return torch.stack(logits) if logits else torch.empty(0, self.spec.vocab_size)

    def _context(self, index: int, starts: list[int], metadata: AttentionMetadata, kv_pool: torch.Tensor) -> list[int]:
        """The tokens up to and including the step's token number `index`, as the pool has them."""
        row = next(row for row in range(len(starts) - 1) if starts[row] <= index < starts[row + 1])
        length = int(metadata.positions[index]) + 1
        assert metadata.query_lengths_host[row] == starts[row + 1] - starts[row]
        pages = kv_pool[metadata.page_table[row].long(), 0]
        flat = pages.transpose(0, 1).reshape(2, -1)[:, :length]
        assert flat[1].tolist() == list(range(length))
        return [int(token_id) for token_id in flat[0].tolist()]
