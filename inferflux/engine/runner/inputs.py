"""From a plan's rows to the tensors of one forward.

Keeps each slot's page table from step to step; everything else is computed anew with a handful of numpy calls, so the
cost hardly grows with the number of rows. Knows no model and no sampling.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.layers.low_rank import Adapted, AdaptedTokens
from inferflux.engine.step import Row
from inferflux.engine.transfer import to_device
from inferflux.kernels.metadata import AttentionMetadata

Ints = npt.NDArray[np.int64]


class ScoredSpan(NamedTuple):
    """One scored row: its number, its first logit among the scored ones, and the prompt tokens those predict."""

    row: int
    first: int
    targets: list[int]


class TokenSpan(NamedTuple):
    """All tokens of one row: its number, and where they stand among the pooled or the watched ones."""

    row: int
    first: int
    num_tokens: int


class Following(NamedTuple):
    """Tokens that the step before sampled: their places among the T tokens, and the slots they were sampled for."""

    places: torch.Tensor
    slots: torch.Tensor


class Batch(NamedTuple):
    """One step, ready for the decoder, once the tokens that follow the step before are filled in.

    token_ids int64 [T]. logit_indices int64 [S + Q + P + W]: first the last token of each of the S sampling rows, in
    order of rows, then every scored, every pooled and every watched token. sampled: the numbers of those rows; slots,
    ends int64 [S]: their slots, and the position their next token will have; sampled_slots: the slots once more, on the
    device. spans: who the Q scored tokens belong to; pooled: the same of the P pooled ones; watched: of the W from
    which nothing is drawn, but whose hidden states must be numbers, for others will find what they wrote. following:
    None when there are none. adapted: the tokens that are computed with adapters; None when there are none.
    """

    token_ids: torch.Tensor
    metadata: AttentionMetadata
    logit_indices: torch.Tensor
    sampled: Sequence[int]
    slots: Ints
    ends: Ints
    sampled_slots: torch.Tensor
    spans: list[ScoredSpan]
    pooled: list[TokenSpan]
    watched: list[TokenSpan]
    following: Following | None
    adapted: Adapted | None = None

    @property
    def num_scored(self) -> int:
        return sum(len(span.targets) for span in self.spans)

    @property
    def num_pooled(self) -> int:
        return sum(span.num_tokens for span in self.pooled)

    @property
    def num_watched(self) -> int:
        return sum(span.num_tokens for span in self.watched)


class _Layout(NamedTuple):
    """Where the step's tokens stand. slots, ends [B], query_starts [B + 1]: by row; owners (slots), positions [T]: by
    token."""

    slots: Ints
    query_starts: Ints
    ends: Ints
    owners: Ints
    positions: Ints


class _Adapters(NamedTuple):
    """numbers int32 [T]: see `Adapted`. places: of each adapter's tokens; None: one adapter has them all."""

    numbers: npt.NDArray[np.int32]
    places: dict[int, Ints | None]


class InputBuilder:
    """Builds batches; owns the page tables of max_batch_size slots with max_pages_per_row pages each."""

    def __init__(self, max_batch_size: int, max_pages_per_row: int, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._device = device
        self._page_table = np.zeros((max_batch_size, max_pages_per_row), np.int32)
        self._num_pages = np.zeros(max_batch_size, np.int64)
        self._counting = np.arange(max_batch_size + 1, dtype=np.int64)
        self._adapters: dict[int, int] = {}

    def clear(self, slot: int, adapter: int = 0) -> None:
        """Empties the slot's page table: another request takes it, computed with this adapter (0: with none)."""
        self._num_pages[slot] = 0
        self._adapters.pop(slot, None)
        if adapter:
            self._adapters[slot] = adapter

    def build(self, rows: Sequence[Row]) -> Batch:
        """Takes the rows' new pages into the tables and lays the step out."""
        for row in rows:
            if row.new_pages:
                self._append(row.slot, row.new_pages)
        lengths = [len(row.token_ids) for row in rows]
        layout = self._lay_out(rows, lengths)
        sampled = [index for index, row in enumerate(rows) if row.sample]
        spans, scored = _scored_tokens(rows, layout.query_starts)
        token_ids = np.fromiter(chain.from_iterable([row.token_ids for row in rows]), np.int64, len(layout.positions))
        pooled, summed = _tokens_of(rows, [row.pool for row in rows], layout.query_starts)
        # The logits of all other tokens are looked at.
        is_watched = [not row.score and (n > 1 or not row.sample) for row, n in zip(rows, lengths, strict=True)]
        watched, seen = _tokens_of(rows, is_watched, layout.query_starts)
        logit_indices = np.concatenate((layout.query_starts[1:][sampled] - 1, *scored, *summed, *seen))
        slots = layout.slots[sampled]
        following = _following(rows, layout)
        adapters = self._adapters_of(rows, lengths) if self._adapters else None
        arrays = [token_ids, logit_indices, *self._geometry(layout), slots, *following]
        if adapters is not None:
            arrays += [adapters.numbers, *(tokens for tokens in adapters.places.values() if tokens is not None)]
        tensors = to_device(arrays, self._device)
        metadata = AttentionMetadata(
            query_starts=tensors[2],
            kv_lengths=tensors[3],
            page_table=tensors[4],
            slots=tensors[5],
            positions=tensors[6],
            query_lengths_host=tuple(lengths),
            kv_lengths_host=tuple(layout.ends.tolist()),
        )
        return Batch(
            token_ids=tensors[0],
            metadata=metadata,
            logit_indices=tensors[1],
            sampled=sampled,
            slots=slots,
            ends=layout.ends[sampled],
            sampled_slots=tensors[7],
            spans=spans,
            pooled=pooled,
            watched=watched,
            following=Following(*tensors[8:10]) if following else None,
            adapted=None if adapters is None else _adapted(adapters.places, tensors[8 + len(following) :]),
        )

    def _append(self, slot: int, pages: list[int]) -> None:
        first = int(self._num_pages[slot])
        end = first + len(pages)
        assert end <= self._page_table.shape[1], "a row has more pages than a request can use"
        self._page_table[slot, first:end] = pages
        self._num_pages[slot] = end

    def _adapters_of(self, rows: Sequence[Row], lengths: list[int]) -> "_Adapters | None":
        """Returns None where all rows are the model's own."""
        numbers = [self._adapters.get(row.slot, 0) for row in rows]
        used = set(numbers)
        if not any(used):
            return None
        by_token = np.repeat(np.array(numbers, np.int32), lengths)
        places = {one: np.flatnonzero(by_token == one) if len(used) > 1 else None for one in sorted(used) if one}
        return _Adapters(by_token, places)

    def _lay_out(self, rows: Sequence[Row], lengths: list[int]) -> _Layout:
        slots = np.array([row.slot for row in rows], np.int64)
        starts = np.array([row.start for row in rows], np.int64)
        if max(lengths) == 1:
            # Most steps: every row computes one token.
            return _Layout(slots, self._counting[: len(rows) + 1], starts + 1, slots, starts)
        counts = np.array(lengths, np.int64)
        query_starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], counts)
        return _Layout(slots, query_starts, starts + counts, np.repeat(slots, counts), positions)

    def _geometry(self, layout: _Layout) -> list[npt.NDArray[Any]]:
        """Returns AttentionMetadata's arrays, in the order of its fields."""
        page_tokens = self._page_tokens
        assert (self._num_pages[layout.slots] * page_tokens >= layout.ends).all(), "a row has fewer pages than tokens"
        pages = self._page_table[layout.owners, layout.positions // page_tokens].astype(np.int64)
        return [
            layout.query_starts.astype(np.int32),
            layout.ends.astype(np.int32),
            self._page_table[layout.slots, : -(-int(layout.ends.max()) // page_tokens)],
            pages * page_tokens + layout.positions % page_tokens,
            layout.positions,
        ]


def _adapted(places: Mapping[int, Ints | None], tensors: list[torch.Tensor]) -> Adapted:
    """tensors: on the device, each token's adapter, then the places of the adapters that have some."""
    numbers, *left = tensors
    on_device = iter(left)
    groups = [AdaptedTokens(one, None if tokens is None else next(on_device)) for one, tokens in places.items()]
    return Adapted(numbers, tuple(groups))


def _following(rows: Sequence[Row], layout: _Layout) -> list[Ints]:
    """Where the tokens of rows that follow the step before stand, and their slots; nothing when there are none."""
    indices = [index for index, row in enumerate(rows) if row.follows]
    return [layout.query_starts[indices], layout.slots[indices]] if indices else []


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


def _tokens_of(rows: Sequence[Row], chosen: Sequence[bool], query_starts: Ints) -> tuple[list[TokenSpan], list[Ints]]:
    """All tokens of the chosen rows."""
    spans: list[TokenSpan] = []
    tokens: list[Ints] = []
    first = 0
    for index in compress(range(len(rows)), chosen):
        num_tokens = len(rows[index].token_ids)
        spans.append(TokenSpan(index, first, num_tokens))
        tokens.append(query_starts[index] + np.arange(num_tokens))
        first += num_tokens
    return spans, tokens
