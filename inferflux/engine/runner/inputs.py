"""From a plan's rows to the tensors of one forward.

Keeps each slot's page table from step to step; everything else is computed anew with a handful of numpy calls, so the
cost hardly grows with the number of rows. Knows no model and no sampling.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.step import Row
from inferflux.engine.transfer import to_device
from inferflux.kernels.metadata import AttentionMetadata

Ints = npt.NDArray[np.int64]


class ScoredSpan(NamedTuple):
    """One scored row: its number, its first logit among the scored ones, and the prompt tokens those predict."""

    row: int
    first: int
    targets: list[int]


class Batch(NamedTuple):
    """One step, ready for the decoder.

    token_ids int64 [T]. logit_indices int64 [S + Q]: first the last token of each of the S sampling rows, in order of
    rows, then every scored token. sampled: the numbers of those rows; slots, ends int64 [S]: their slots, and the
    position their next token will have. spans: who the Q scored tokens belong to.
    """

    token_ids: torch.Tensor
    metadata: AttentionMetadata
    logit_indices: torch.Tensor
    sampled: Sequence[int]
    slots: Ints
    ends: Ints
    spans: list[ScoredSpan]


class InputBuilder:
    """Builds batches; owns the page tables of max_batch_size slots with max_pages_per_row pages each."""

    def __init__(self, max_batch_size: int, max_pages_per_row: int, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._device = device
        self._page_table = np.zeros((max_batch_size, max_pages_per_row), np.int32)
        self._num_pages = np.zeros(max_batch_size, np.int64)
        self._counting = np.arange(max_batch_size + 1, dtype=np.int64)

    def clear(self, slot: int) -> None:
        """Empties the slot's page table: another request takes it."""
        self._num_pages[slot] = 0

    def pages_of(self, slot: int) -> list[int]:
        pages: list[int] = self._page_table[slot, : self._num_pages[slot]].tolist()
        return pages

    def build(self, rows: Sequence[Row]) -> Batch:
        """Takes the rows' new pages into the tables and lays the step out."""
        for row in rows:
            if row.new_pages:
                self._append(row.slot, row.new_pages)
        slots = np.array([row.slot for row in rows], np.int64)
        starts = np.array([row.start for row in rows], np.int64)
        lengths = [len(row.token_ids) for row in rows]
        if max(lengths) == 1:
            query_starts, owners, positions, ends = self._counting[: len(rows) + 1], slots, starts, starts + 1
        else:
            query_starts, owners, positions, ends = _spread(slots, starts, lengths)
        assert (self._num_pages[slots] * self._page_tokens >= ends).all(), "a row has fewer pages than tokens"
        sampled = [index for index, row in enumerate(rows) if row.sample]
        last_tokens = query_starts[1:] - 1
        spans, scored = _scored_tokens(rows, query_starts)
        arrays = [
            np.fromiter(chain.from_iterable([row.token_ids for row in rows]), np.int64, len(positions)),
            np.concatenate((last_tokens[sampled], *scored)),
            *self._metadata_arrays(slots, query_starts, owners, positions, ends),
        ]
        token_ids, logit_indices, *tensors = to_device(arrays, self._device)
        metadata = AttentionMetadata(*tensors, tuple(lengths), tuple(ends.tolist()))
        return Batch(token_ids, metadata, logit_indices, sampled, slots[sampled], ends[sampled], spans)

    def _append(self, slot: int, pages: list[int]) -> None:
        first = int(self._num_pages[slot])
        end = first + len(pages)
        assert end <= self._page_table.shape[1], "a row has more pages than a request can use"
        self._page_table[slot, first:end] = pages
        self._num_pages[slot] = end

    def _metadata_arrays(
        self, slots: Ints, query_starts: Ints, owners: Ints, positions: Ints, ends: Ints
    ) -> tuple[npt.NDArray[Any], ...]:
        """AttentionMetadata's tensors, in the order of its fields. owners [T]: the slot of each token."""
        page_tokens = self._page_tokens
        pages = self._page_table[owners, positions // page_tokens].astype(np.int64)
        return (
            query_starts.astype(np.int32),
            ends.astype(np.int32),
            self._page_table[slots, : -(-int(ends.max()) // page_tokens)],
            pages * page_tokens + positions % page_tokens,
            positions,
        )


def _spread(slots: Ints, starts: Ints, lengths: list[int]) -> tuple[Ints, Ints, Ints, Ints]:
    """Rows of `lengths` tokens each -> query_starts [B + 1], the slot [T] and position [T] of each token, ends [B]."""
    counts = np.array(lengths, np.int64)
    query_starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(counts, out=query_starts[1:])
    positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], counts)
    return query_starts, np.repeat(slots, counts), positions, starts + counts


def _scored_tokens(rows: Sequence[Row], query_starts: Ints) -> tuple[list[ScoredSpan], list[Ints]]:
    """The tokens whose logits score the one that follows: all of a scored row but a last one nothing follows."""
    spans: list[ScoredSpan] = []
    tokens: list[Ints] = []
    first = 0
    for index, row in enumerate(rows):
        if row.score:
            targets = row.token_ids[1:] + ([] if row.next_token_id is None else [row.next_token_id])
            spans.append(ScoredSpan(index, first, targets))
            tokens.append(query_starts[index] + np.arange(len(targets)))
            first += len(targets)
    return spans, tokens
