"""InputBuilder: turns a plan's rows into the arrays and tensors of one forward.

Keeps each slot's page table from step to step; the rest is computed anew with a few numpy calls, so the cost hardly
grows with the number of rows. Knows no model and no sampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.layers.lora import AdapterGroup, StepAdapters
from inferflux.engine.step import Row
from inferflux.engine.transfer import to_device
from inferflux.kernels.metadata import AttentionMetadata

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]


class ScoredSpan(NamedTuple):
    """One scored row: its number, its first logit among the scored ones, and the prompt tokens that its logits
    predict."""

    row: int
    first: int
    targets: list[int]


class TokenSpan(NamedTuple):
    """All tokens of one row: its number, and where they stand among the pooled or the checked ones."""

    row: int
    first: int
    num_tokens: int


class Following(NamedTuple):
    """Tokens that the previous step samples: their places among the T tokens, and the slots they are sampled for."""

    places: torch.Tensor
    slots: torch.Tensor


class AdapterArrays(NamedTuple):
    """numbers int32 [T]: see `StepAdapters`. places: of each adapter's tokens; None: all tokens use this adapter."""

    numbers: Ints32
    places: dict[int, Ints | None]


class Arrays(NamedTuple):
    """One step on the host. token_ids int64 [T]. logit_indices: see `Batch`. query_starts, kv_lengths, page_table,
    kv_slots, positions: as in AttentionMetadata, kv_slots being its slots. slots int64 [S]: of the sampling rows."""

    token_ids: Ints
    logit_indices: Ints
    query_starts: Ints32
    kv_lengths: Ints32
    page_table: Ints32
    kv_slots: Ints
    positions: Ints
    slots: Ints


class Tensors(NamedTuple):
    """One step on the device; see `Batch`. following: None when there are no such tokens. adapters: None when no token
    uses one."""

    token_ids: torch.Tensor
    logit_indices: torch.Tensor
    metadata: AttentionMetadata
    sampled_slots: torch.Tensor
    following: Following | None
    adapters: StepAdapters | None


@dataclass(eq=False)
class Batch:
    """One step, ready for the decoder once the tokens that the previous step samples are filled in (`following`).

    lengths: tokens of each row.
    logit_indices int64 [S + Q + P + C]: the last token of each of the S sampling rows, in order of rows, then every
        scored, pooled and checked token.
    sampled: the numbers of the sampling rows. next_positions int64 [S]: the positions their next tokens will have.
    only_decodes: every row computes one token and samples the next, and nothing else is asked for.
    scored: whose the Q scored tokens are (prompt log-probabilities). pooled: whose the P pooled ones are.
    checked: whose the C tokens are whose hidden states must be finite although nothing is sampled from them, since
        other requests will read the pages they write.
    following: places and slots, see `Following`; empty when there are none.
    """

    device: torch.device
    arrays: Arrays
    lengths: tuple[int, ...]
    sampled: Sequence[int]
    next_positions: Ints
    only_decodes: bool
    scored: Sequence[ScoredSpan] = ()
    pooled: Sequence[TokenSpan] = ()
    checked: Sequence[TokenSpan] = ()
    following: Sequence[Ints] = ()
    adapters: AdapterArrays | None = None

    @property
    def slots(self) -> Ints:
        return self.arrays.slots

    @property
    def num_scored(self) -> int:
        return sum(len(span.targets) for span in self.scored)

    @property
    def num_pooled(self) -> int:
        return sum(span.num_tokens for span in self.pooled)

    @property
    def num_checked(self) -> int:
        return sum(span.num_tokens for span in self.checked)

    @cached_property
    def tensors(self) -> Tensors:
        """The step on the device, made on first use: a tape reads `arrays` instead. On a CPU both share memory."""
        arrays: list[npt.NDArray[Any]] = [*self.arrays, *self.following]
        if self.adapters is not None:
            arrays += [self.adapters.numbers, *(one for one in self.adapters.places.values() if one is not None)]
        token_ids, logit_indices, query_starts, kv_lengths, page_table, kv_slots, positions, slots, *others = to_device(
            arrays, self.device
        )
        metadata = AttentionMetadata(
            query_starts=query_starts,
            kv_lengths=kv_lengths,
            page_table=page_table,
            slots=kv_slots,
            positions=positions,
            query_lengths_host=self.lengths,
            kv_lengths_host=tuple(self.arrays.kv_lengths.tolist()),
        )
        following, others = others[: len(self.following)], others[len(self.following) :]
        return Tensors(
            token_ids,
            logit_indices,
            metadata,
            slots,
            Following(*following) if following else None,
            None if self.adapters is None else _step_adapters(self.adapters.places, others),
        )


class _Layout(NamedTuple):
    """The step's layout. By row: slots, next_positions [B], query_starts int32 [B + 1]. By token: token_slots,
    positions [T]."""

    slots: Ints
    query_starts: Ints32
    next_positions: Ints
    token_slots: Ints
    positions: Ints


class InputBuilder:
    """Builds batches; owns the page tables of max_batch_size slots with max_pages_per_row pages each."""

    def __init__(self, max_batch_size: int, max_pages_per_row: int, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._device = device
        self._page_table = np.zeros((max_batch_size, max_pages_per_row), np.int32)
        self._num_pages = [0] * max_batch_size
        self._counting = np.arange(max_batch_size, dtype=np.int64)
        self._starts_of_one = np.arange(max_batch_size + 1, dtype=np.int32)
        self._adapters: dict[int, int] = {}

    def clear(self, slot: int, adapter: int = 0) -> None:
        """Empties the slot's page table for a new request, which uses this adapter (0: none)."""
        self._num_pages[slot] = 0
        self._adapters.pop(slot, None)
        if adapter:
            self._adapters[slot] = adapter

    def build(self, rows: Sequence[Row]) -> Batch:
        """Adds the rows' new pages to the page tables and returns the step's arrays."""
        last = 0
        for row in rows:
            if row.new_pages:
                self._append(row.slot, row.new_pages)
            end = row.start + len(row.token_ids)
            assert end <= self._num_pages[row.slot] * self._page_tokens, "a row has fewer pages than tokens"
            last = max(last, end)
        num_pages = -(-last // self._page_tokens)
        if all(len(row.token_ids) == 1 and row.sample and not (row.score or row.pool) for row in rows):
            return self._decodes(rows, num_pages)
        lengths = [len(row.token_ids) for row in rows]
        layout = self._lay_out(rows, lengths)
        sampled = [index for index, row in enumerate(rows) if row.sample]
        scored_spans, scored_tokens = _scored_tokens(rows, layout.query_starts)
        token_ids = np.fromiter(chain.from_iterable([row.token_ids for row in rows]), np.int64, len(layout.positions))
        pooled, pooled_tokens = _tokens_of(rows, [row.pool for row in rows], layout.query_starts)
        # All other tokens are checked by their logits.
        is_checked = [not row.score and (n > 1 or not row.sample) for row, n in zip(rows, lengths, strict=True)]
        checked, checked_tokens = _tokens_of(rows, is_checked, layout.query_starts)
        last_tokens = layout.query_starts[1:][sampled] - 1
        logit_indices = np.concatenate((last_tokens, *scored_tokens, *pooled_tokens, *checked_tokens), dtype=np.int64)
        return Batch(
            self._device,
            self._arrays(layout, num_pages, token_ids, logit_indices, layout.slots[sampled]),
            tuple(lengths),
            sampled=sampled,
            next_positions=layout.next_positions[sampled],
            only_decodes=False,
            scored=scored_spans,
            pooled=pooled,
            checked=checked,
            following=_following(rows, layout),
            adapters=self._adapters_of(rows, lengths) if self._adapters else None,
        )

    def _decodes(self, rows: Sequence[Row], num_pages: int) -> Batch:
        """The common case: every row computes one token and samples."""
        num_rows = len(rows)
        slots = np.array([row.slot for row in rows], np.int64)
        positions = np.array([row.start for row in rows], np.int64)
        next_positions = positions + 1
        layout = _Layout(slots, self._starts_of_one[: num_rows + 1], next_positions, slots, positions)
        token_ids = np.array([row.token_ids[0] for row in rows], np.int64)
        lengths = (1,) * num_rows
        return Batch(
            self._device,
            self._arrays(layout, num_pages, token_ids, self._counting[:num_rows], slots),
            lengths,
            sampled=range(num_rows),
            next_positions=next_positions,
            only_decodes=True,
            following=_following(rows, layout),
            adapters=self._adapters_of(rows, lengths) if self._adapters else None,
        )

    def _append(self, slot: int, pages: list[int]) -> None:
        first = self._num_pages[slot]
        end = first + len(pages)
        assert end <= self._page_table.shape[1], "a row has more pages than a request can use"
        self._page_table[slot, first:end] = pages
        self._num_pages[slot] = end

    def _adapters_of(self, rows: Sequence[Row], lengths: Sequence[int]) -> AdapterArrays | None:
        """Returns None if no row uses an adapter."""
        numbers = [self._adapters.get(row.slot, 0) for row in rows]
        used = set(numbers)
        if not any(used):
            return None
        by_token = np.repeat(np.array(numbers, np.int32), lengths)
        places = {one: np.flatnonzero(by_token == one) if len(used) > 1 else None for one in sorted(used) if one}
        return AdapterArrays(by_token, places)

    def _lay_out(self, rows: Sequence[Row], lengths: list[int]) -> _Layout:
        slots = np.array([row.slot for row in rows], np.int64)
        starts = np.array([row.start for row in rows], np.int64)
        counts = np.array(lengths, np.int64)
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], counts)
        return _Layout(slots, query_starts, starts + counts, np.repeat(slots, counts), positions)

    def _arrays(
        self, layout: _Layout, num_pages: int, token_ids: Ints, logit_indices: Ints, sampled_slots: Ints
    ) -> Arrays:
        """num_pages: of the longest row."""
        places, offsets = np.divmod(layout.positions, self._page_tokens)
        pages = self._page_table[layout.token_slots, places]
        return Arrays(
            token_ids=token_ids,
            logit_indices=logit_indices,
            query_starts=layout.query_starts,
            kv_lengths=layout.next_positions.astype(np.int32),
            page_table=self._page_table[layout.slots, :num_pages],
            kv_slots=np.multiply(pages, self._page_tokens, dtype=np.int64) + offsets,
            positions=layout.positions,
            slots=sampled_slots,
        )


def _step_adapters(places: Mapping[int, Ints | None], tensors: list[torch.Tensor]) -> StepAdapters:
    """tensors: on the device, each token's adapter, then the places of each adapter that has any."""
    numbers, *left = tensors
    on_device = iter(left)
    groups = [AdapterGroup(one, None if tokens is None else next(on_device)) for one, tokens in places.items()]
    return StepAdapters(numbers, tuple(groups))


def _following(rows: Sequence[Row], layout: _Layout) -> list[Ints]:
    """Returns the places of tokens that the previous step samples, and their slots; empty when there are none."""
    indices = [index for index, row in enumerate(rows) if row.follows]
    return [layout.query_starts[indices].astype(np.int64), layout.slots[indices]] if indices else []


def _scored_tokens(rows: Sequence[Row], query_starts: Ints32) -> tuple[list[ScoredSpan], list[Ints]]:
    """Returns the tokens whose logits score the next one: all of a scored row, but for the prompt's last token."""
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


def _tokens_of(rows: Sequence[Row], chosen: Sequence[bool], query_starts: Ints32) -> tuple[list[TokenSpan], list[Ints]]:
    """Returns all tokens of the chosen rows."""
    spans: list[TokenSpan] = []
    tokens: list[Ints] = []
    first = 0
    for index in compress(range(len(rows)), chosen):
        num_tokens = len(rows[index].token_ids)
        spans.append(TokenSpan(index, first, num_tokens))
        tokens.append(query_starts[index] + np.arange(num_tokens))
        first += num_tokens
    return spans, tokens
