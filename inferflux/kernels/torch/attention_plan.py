"""AttentionPlan: how one step's attention is cut into pieces that torch's fused attention takes.

Worked out once per step and window and kept in the metadata, so that every layer only gathers and multiplies. Knows
positions and pages; sees no query, key or value.
"""

from dataclasses import dataclass

import torch

from inferflux.kernels.metadata import AttentionMetadata

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Limits:
    """decode_tokens: padded context tokens of the decoding rows computed together. query_block: queries of a prefill
    chunk computed together."""

    decode_tokens: int
    query_block: int


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one query each, padded to one length.

    tokens: int64 [n], their queries among the step's T tokens. pages: int64 [n * pages each], to be gathered.
    start, stop: the slots to look at among those of the gathered pages. mask: [n, 1, 1, stop - start], 0 or -inf, or
    None: all are seen. hidden: int64, those of the n * (gathered slots of a row) that may hold anything, NaN included,
    because the row never wrote them; other unseen slots hold what the row itself wrote.
    """

    tokens: Tensor
    pages: Tensor
    start: int
    stop: int
    mask: Tensor | None
    hidden: Tensor | None


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Queries first..last-1 of the step's T tokens see slots start..stop-1 of the row's gathered pages.

    mask: [queries, stop - start], 0 or -inf; None: plain causal, the first query sees only the first slot.
    """

    first: int
    last: int
    start: int
    stop: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One row of several queries. pages: int64, to be gathered."""

    pages: Tensor
    blocks: tuple[QueryBlock, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    groups: tuple[DecodeGroup, ...]
    rows: tuple[PrefillRow, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a plan depends on besides the metadata. mask_dtype: the type attention is computed in. fused: the operator
    knows causal attention, so that whole prompts need no mask and no blocks."""

    page_tokens: int
    window: int | None
    mask_dtype: torch.dtype
    limits: Limits
    fused: bool

    def first_seen(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window + 1)

    def pages_of(self, length: int, first_seen: int) -> range:
        """Page-table columns that hold positions first_seen..length-1."""
        return range(first_seen // self.page_tokens, -(-length // self.page_tokens))


def plan_attention(metadata: AttentionMetadata, geometry: Geometry) -> AttentionPlan:
    """Returns the step's plan, made at the first call for this geometry."""
    key = ("torch.attention", geometry)
    plan: AttentionPlan | None = metadata.derived.get(key)
    if plan is None:
        plan = metadata.derived[key] = _make_plan(metadata, geometry)
    return plan


def _make_plan(metadata: AttentionMetadata, geometry: Geometry) -> AttentionPlan:
    decoding: list[tuple[int, int]] = []
    prefilling: list[tuple[int, int]] = []
    first = 0
    for row, num_queries in enumerate(metadata.query_lengths_host):
        (decoding if num_queries == 1 else prefilling).append((row, first))
        first += num_queries
    pieces = _split(decoding, metadata, geometry)
    groups = tuple(_decode_group(metadata, geometry, group) for group in pieces)
    mask = _band(metadata, geometry, prefilling) if prefilling else None
    rows = tuple(_prefill_row(metadata, geometry, row, first, mask) for row, first in prefilling)
    return AttentionPlan(groups, rows)


def _split(
    decoding: list[tuple[int, int]], metadata: AttentionMetadata, geometry: Geometry
) -> list[list[tuple[int, int]]]:
    """Cuts (row, token) pairs, ordered by context length, into groups whose padded size stays within the limit."""
    lengths = metadata.kv_lengths_host
    groups: list[list[tuple[int, int]]] = []
    for row, token in sorted(decoding, key=lambda pair: lengths[pair[0]]):
        seen = lengths[row] - geometry.first_seen(lengths[row] - 1)
        if not groups or (len(groups[-1]) + 1) * seen > geometry.limits.decode_tokens:
            groups.append([])
        groups[-1].append((row, token))
    return groups


def _decode_group(metadata: AttentionMetadata, geometry: Geometry, group: list[tuple[int, int]]) -> DecodeGroup:
    device = metadata.page_table.device
    lengths = [metadata.kv_lengths_host[row] for row, _ in group]
    seen_from = [geometry.first_seen(length - 1) for length in lengths]
    columns = [geometry.pages_of(length, first) for length, first in zip(lengths, seen_from, strict=True)]
    starts = [first - span.start * geometry.page_tokens for first, span in zip(seen_from, columns, strict=True)]
    stops = [length - span.start * geometry.page_tokens for length, span in zip(lengths, columns, strict=True)]
    num_columns = max(len(span) for span in columns)
    first_columns = torch.tensor([[span.start] for span in columns], device=device)
    wanted = first_columns + torch.arange(num_columns, device=device)
    rows = torch.tensor([[row] for row, _ in group], device=device)
    num_own = torch.tensor([[len(span)] for span in columns], device=device)
    # Shorter rows repeat their own first page: what it holds they wrote themselves, if they filled it.
    wanted = torch.where(wanted < first_columns + num_own, wanted, first_columns)
    pages = metadata.page_table[rows, wanted].flatten().long()
    tokens = torch.tensor([token for _, token in group], device=device)
    start, stop = min(starts), max(stops)
    if min(stops) == stop and max(starts) == start:
        return DecodeGroup(tokens, pages, start, stop, None, None)
    slots = torch.arange(num_columns * geometry.page_tokens, device=device)
    spans = torch.tensor(list(zip(starts, stops, strict=True)), device=device)
    unseen = (slots < spans[:, :1]) | (slots >= spans[:, 1:])
    mask = torch.zeros(unseen.shape, dtype=geometry.mask_dtype, device=device).masked_fill_(unseen, float("-inf"))
    # Never written: the end of a row's last page, and with it every repeat of a row's only page.
    ends = torch.where(num_own > 1, num_own, num_columns) * geometry.page_tokens
    hidden = ((slots >= spans[:, 1:]) & (slots < ends)).flatten().nonzero()[:, 0]
    return DecodeGroup(tokens, pages, start, stop, mask[:, None, None, start:stop], hidden)


def _prefill_row(
    metadata: AttentionMetadata, geometry: Geometry, row: int, first_token: int, band: Tensor | None
) -> PrefillRow:
    num_queries, length = metadata.query_lengths_host[row], metadata.kv_lengths_host[row]
    context = length - num_queries
    columns = geometry.pages_of(length, geometry.first_seen(context))
    pages = metadata.page_table[row, columns.start : columns.stop].long()
    if band is None or _is_plain_causal(geometry, num_queries, length):
        whole = QueryBlock(first_token, first_token + num_queries, 0, num_queries, None)
        return PrefillRow(pages, (whole,))
    offset = columns.start * geometry.page_tokens
    blocks = []
    for first in range(0, num_queries, geometry.limits.query_block):
        last = min(first + geometry.limits.query_block, num_queries)
        start, stop = geometry.first_seen(context + first), context + last
        mask = band[band.shape[0] - (last - first) :, band.shape[1] - (stop - start) :]
        blocks.append(QueryBlock(first_token + first, first_token + last, start - offset, stop - offset, mask))
    return PrefillRow(pages, tuple(blocks))


def _is_plain_causal(geometry: Geometry, num_queries: int, length: int) -> bool:
    in_window = geometry.window is None or length <= geometry.window
    return geometry.fused and num_queries == length and in_window


def _band(metadata: AttentionMetadata, geometry: Geometry, prefilling: list[tuple[int, int]]) -> Tensor | None:
    """The mask of the largest query block; every block's own is its lower right corner. None: no block needs one.

    Entry (i, j) is 0 if the query `rows - 1 - i` places before the last sees the slot `columns - 1 - j` before it.
    """
    num_rows = num_columns = 0
    for row, _ in prefilling:
        num_queries, length = metadata.query_lengths_host[row], metadata.kv_lengths_host[row]
        if not _is_plain_causal(geometry, num_queries, length):
            num_rows = max(num_rows, min(num_queries, geometry.limits.query_block))
            num_columns = max(num_columns, length)
    if not num_rows:
        return None
    if geometry.window is not None:
        num_columns = min(num_columns, geometry.window + num_rows - 1)
    device = metadata.page_table.device
    places = torch.arange(num_columns - num_rows, num_columns, device=device).unsqueeze(1)
    distance = places - torch.arange(num_columns, device=device)
    hidden = distance < 0 if geometry.window is None else (distance < 0) | (distance >= geometry.window)
    band = torch.zeros(hidden.shape, dtype=geometry.mask_dtype, device=device)
    return band.masked_fill_(hidden, float("-inf"))
