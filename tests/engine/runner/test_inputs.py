"""One step's tensors against a plain loop over rows and tokens."""

import pytest
import torch

from inferflux.engine.runner.inputs import InputBuilder
from inferflux.engine.step import Row

PAGE_TOKENS = 4


def make_builder() -> InputBuilder:
    return InputBuilder(max_batch_size=6, max_pages_per_row=5, page_tokens=PAGE_TOKENS, device=torch.device("cpu"))


MIXED = [
    Row(slot=4, start=6, token_ids=[10], new_pages=[7, 3], sample=True),
    Row(slot=0, start=0, token_ids=[11, 12, 13, 14, 15], new_pages=[9, 2], sample=False),
    Row(slot=2, start=4, token_ids=[16, 17], new_pages=[1, 8, 5], sample=True),
]
DECODES = [
    Row(slot=5, start=8, token_ids=[20], new_pages=[0, 1, 2], sample=True),
    Row(slot=1, start=3, token_ids=[21], new_pages=[6], sample=True),
]


@pytest.mark.parametrize("rows", [MIXED, DECODES, MIXED[1:2]], ids=["mixed", "decodes", "one chunk"])
def test_tensors_equal_a_plain_loop(rows: list[Row]):
    batch = make_builder().build(rows)
    metadata = batch.tensors.metadata
    token_ids, positions, slots, starts, last = [], [], [], [0], []
    for row in rows:
        for position, token_id in enumerate(row.token_ids, row.start):
            token_ids.append(token_id)
            positions.append(position)
            slots.append(row.new_pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
        starts.append(len(token_ids))
        last.append(len(token_ids) - 1)
    assert batch.tensors.token_ids.tolist() == token_ids
    assert metadata.positions.tolist() == positions
    assert metadata.slots.tolist() == slots
    assert metadata.query_starts.tolist() == starts
    assert metadata.query_lengths_host == tuple(len(row.token_ids) for row in rows)
    ends = [row.start + len(row.token_ids) for row in rows]
    assert metadata.kv_lengths.tolist() == list(metadata.kv_lengths_host) == ends
    for row, end, table in zip(rows, ends, metadata.page_table.tolist(), strict=True):
        num_pages = -(-end // PAGE_TOKENS)
        assert table[:num_pages] == row.new_pages[:num_pages]
    sampled = [index for index, row in enumerate(rows) if row.sample]
    assert list(batch.sampled) == sampled
    unfinished = [index for index, row in enumerate(rows) if len(row.token_ids) > 1 or not row.sample]
    watched = [token for index in unfinished for token in range(starts[index], starts[index + 1])]
    assert batch.tensors.logit_indices.tolist() == [last[index] for index in sampled] + watched
    assert [span.row for span in batch.checked] == unfinished
    assert batch.num_checked == len(watched)
    assert batch.slots.tolist() == [rows[index].slot for index in sampled]
    assert batch.next_positions.tolist() == [ends[index] for index in sampled]


def test_types_are_those_the_kernels_are_promised():
    batch = make_builder().build(MIXED)
    metadata = batch.tensors.metadata
    for tensor in (batch.tensors.token_ids, batch.tensors.logit_indices, metadata.slots, metadata.positions):
        assert tensor.dtype == torch.int64
    for tensor in (metadata.query_starts, metadata.kv_lengths, metadata.page_table):
        assert tensor.dtype == torch.int32


def test_pages_are_appended_and_a_new_owner_starts_afresh():
    builder = make_builder()
    builder.build([Row(3, 0, [1, 2, 3, 4], [7], True)])
    batch = builder.build([Row(3, 4, [5], [2], True)])
    assert batch.tensors.metadata.page_table.tolist() == [[7, 2]]
    assert batch.tensors.metadata.slots.tolist() == [2 * PAGE_TOKENS]
    builder.clear(3)
    batch = builder.build([Row(3, 0, [6], [1], True)])
    assert batch.tensors.metadata.page_table.tolist() == [[1]]


def adapted(rows: list[Row], adapters: dict[int, int]) -> list[tuple[int, list[int] | None]]:
    builder = make_builder()
    for row in rows:
        builder.clear(row.slot, adapters.get(row.slot, 0))
    batch = builder.build(rows)
    if batch.tensors.adapters is None:
        return []
    own = [adapters.get(row.slot, 0) for row in rows for _ in row.token_ids]
    assert batch.tensors.adapters.numbers.tolist() == own
    return [(one.adapter, None if one.tokens is None else one.tokens.tolist()) for one in batch.tensors.adapters.groups]


def test_adapters_get_the_tokens_of_their_rows() -> None:
    assert adapted(MIXED, {4: 2, 2: 1}) == [(1, [6, 7]), (2, [0])]
    assert adapted(MIXED, {0: 3}) == [(3, [1, 2, 3, 4, 5])]
    assert adapted(DECODES, {5: 1, 1: 1}) == [(1, None)], "one adapter has them all: nothing is gathered"
    assert adapted(DECODES, {}) == []


def test_a_new_owner_of_a_slot_has_an_adapter_of_its_own() -> None:
    builder = make_builder()
    builder.clear(3, adapter=1)
    assert builder.build([Row(3, 0, [6], [1], True)]).adapters
    builder.clear(3)
    assert not builder.build([Row(3, 0, [6], [1], True)]).adapters


def test_a_token_without_a_page_is_our_mistake():
    with pytest.raises(AssertionError, match="fewer pages"):
        make_builder().build([Row(0, 0, [1, 2, 3, 4, 5], [7], True)])


def test_scored_tokens_follow_the_sampled_ones():
    rows = [
        Row(0, 0, [1, 2, 3], [0], sample=False, score=True, next_token_id=9),
        Row(1, 0, [4], [1], sample=True),
        Row(2, 0, [5, 6], [2], sample=True, score=True),
        Row(3, 0, [8], [3], sample=True, score=True),
    ]
    batch = make_builder().build(rows)
    assert batch.tensors.logit_indices.tolist() == [3, 5, 6, 0, 1, 2, 4]
    assert [tuple(span) for span in batch.scored] == [(0, 0, [2, 3, 9]), (2, 3, [6]), (3, 4, [])]
