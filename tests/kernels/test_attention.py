"""What the torch backend's attention adds to its meaning: plans shared by layers, and rows that stay apart."""

import pytest
import torch

from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import DECODE, MIXED, Paging
from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.torch.attention import attention
from inferflux.kernels.torch.attention_plan import Geometry, Limits, plan_attention

SETTINGS = {"scale": 0.125, "soft_cap": None}


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))


def row_of(metadata: AttentionMetadata, row: int) -> AttentionMetadata:
    """The step that computes one row alone."""
    first, last = metadata.query_starts[row : row + 2].tolist()
    return AttentionMetadata(
        query_starts=torch.tensor([0, last - first], dtype=torch.int32),
        kv_lengths=metadata.kv_lengths[row : row + 1],
        page_table=metadata.page_table[row : row + 1],
        slots=metadata.slots[first:last],
        positions=metadata.positions[first:last],
        query_lengths_host=metadata.query_lengths_host[row : row + 1],
        kv_lengths_host=metadata.kv_lengths_host[row : row + 1],
    )


@pytest.mark.parametrize("window", [None, 25])
def test_a_row_is_the_same_alone_and_in_a_batch(draw: Draw, window: int | None) -> None:
    paging = Paging(MIXED)
    metadata = paging.metadata(draw)
    kv_pages = paging.pool(draw, 3, 64)
    paging.fill(kv_pages, metadata, draw)
    query = draw.normal(paging.num_tokens, 9, 64)
    together = attention(query, kv_pages, metadata, window=window, **SETTINGS)
    for row, (first, last) in enumerate(zip(metadata.query_starts[:-1], metadata.query_starts[1:], strict=True)):
        alone = attention(query[first:last], kv_pages, row_of(metadata, row), window=window, **SETTINGS)
        torch.testing.assert_close(together[first:last], alone, rtol=1e-5, atol=1e-6)


def test_layers_share_one_plan_per_window(draw: Draw) -> None:
    paging = Paging(DECODE)
    metadata = paging.metadata(draw)
    kv_pages = paging.pool(draw, 3, 64)
    paging.fill(kv_pages, metadata, draw)
    query = draw.normal(paging.num_tokens, 9, 64)
    for window in (None, 64, None, 64):
        attention(query, kv_pages, metadata, window=window, **SETTINGS)
    assert len(metadata.derived) == 2


def test_groups_bound_the_padding(draw: Draw) -> None:
    metadata = Paging(((0, 1), (0, 1), (99, 100), (199, 200), (499, 500), (9, 10))).metadata(draw)
    geometry = Geometry(16, None, torch.float32, Limits(decode_tokens=400, query_block=64), fused=True)
    groups = plan_attention(metadata, geometry).groups
    assert [len(group.tokens) for group in groups] == [4, 1, 1]
    assert all(len(group.tokens) * group.stop <= 400 or len(group.tokens) == 1 for group in groups)
    assert sorted(token for group in groups for token in group.tokens.tolist()) == list(range(6))


def test_only_pages_within_the_window_are_gathered(draw: Draw) -> None:
    metadata = Paging(((999, 1000), (600, 700))).metadata(draw)
    plan = plan_attention(metadata, Geometry(16, 32, torch.float32, Limits(4096, 128), fused=True))
    assert len(plan.groups[0].pages) == 3
    assert len(plan.rows[0].pages) == (700 - 569) // 16 + 1


def test_scores_formed_by_hand_come_in_blocks(draw: Draw) -> None:
    """A whole prompt at once would take memory with the square of its length."""
    metadata = Paging(((0, 300),)).metadata(draw)
    fused, by_hand = (
        plan_attention(metadata, Geometry(16, None, torch.float32, Limits(4096, 128), fused=fused)).rows[0].blocks
        for fused in (True, False)
    )
    assert [(block.first, block.last, block.stop) for block in fused] == [(0, 300, 300)]
    assert [(block.first, block.last, block.stop) for block in by_hand] == [
        (0, 128, 128),
        (128, 256, 256),
        (256, 300, 300),
    ]
