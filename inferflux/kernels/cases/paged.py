"""Cases of the ops that see the paged cache: attention and rope."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from inferflux.kernels.cases.case import Case, Draw, Inputs, NamedCases
from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.quantized_kv import LARGEST_CODE, SCALE_BYTES, as_bytes, is_quantized, quantize

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Paging:
    """A paged context: `spans` are the positions [start, stop) that each row computes; it holds all before them.
    shared: so many pages at the start are the same in all rows, as those of a prompt that several begin with."""

    spans: tuple[tuple[int, int], ...]
    page_tokens: int = 16
    num_layers: int = 3
    shared: int = 0

    def metadata(self, draw: Draw) -> AttentionMetadata:
        """Pages are dealt in random order; the table's spare entries name a page that is nobody's."""
        page_counts = [-(-stop // self.page_tokens) for _, stop in self.spans]
        order = draw.permutation(self.num_pages).to(torch.int32)
        table = torch.full((len(self.spans), max(page_counts) + 1), int(order[-1]), dtype=torch.int32)
        for row, pages in enumerate(order[:-1].split([*page_counts, self.num_pages - 1 - sum(page_counts)])[:-1]):
            table[row, : len(pages)] = pages
        table[:, : self.shared] = table[:1, : self.shared]
        lengths = [stop - start for start, stop in self.spans]
        positions = torch.cat([torch.arange(start, stop) for start, stop in self.spans])
        rows = torch.repeat_interleave(torch.arange(len(self.spans)), torch.tensor(lengths))
        return AttentionMetadata(
            query_starts=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(draw.device),
            kv_lengths=torch.tensor([stop for _, stop in self.spans], dtype=torch.int32).to(draw.device),
            page_table=table.to(draw.device),
            slots=self._slots(table, rows, positions).to(draw.device),
            positions=positions.to(draw.device),
            query_lengths_host=tuple(lengths),
            kv_lengths_host=tuple(stop for _, stop in self.spans),
        )

    @property
    def num_pages(self) -> int:
        return sum(-(-stop // self.page_tokens) for _, stop in self.spans) + 3

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def pool(self, draw: Draw, num_kv_heads: int, head_dim: int, quantized_as: torch.dtype | None = None) -> Tensor:
        """One layer's strided view [P, 2, N, K, D] of a page-major pool that is NaN everywhere; quantized_as: pages of
        this 8-bit type instead, whose scales (and codes, in float8) are."""
        shape = (self.num_pages, self.num_layers, 2, self.page_tokens, num_kv_heads)
        if quantized_as is None:
            pool = torch.full((*shape, head_dim), math.nan, dtype=draw.dtype, device=draw.device)
        else:
            # All bits set are NaN in float32 and in float8.
            pool = torch.full((*shape, head_dim + SCALE_BYTES), -1, dtype=torch.int8, device=draw.device).view(
                quantized_as
            )
        return pool[:, self.num_layers // 2]

    def fill(self, kv_pages: Tensor, metadata: AttentionMetadata, draw: Draw) -> None:
        """Writes keys and values at every position that some row holds."""
        for row, (_, stop) in enumerate(self.spans):
            positions = torch.arange(stop)
            slots = self._slots(metadata.page_table.cpu(), torch.full_like(positions, row), positions).to(draw.device)
            pages, offsets = slots // self.page_tokens, slots % self.page_tokens
            if is_quantized(kv_pages):
                values = draw.normal(stop, 2, kv_pages.shape[3], kv_pages.shape[4] - SCALE_BYTES)
                as_bytes(kv_pages)[pages, :, offsets] = quantize(values, kv_pages.dtype)
            else:
                kv_pages[pages, :, offsets] = draw.normal(stop, 2, *kv_pages.shape[3:])

    def _slots(self, table: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        return table[rows, positions // self.page_tokens].long() * self.page_tokens + positions % self.page_tokens


DECODE: Final = ((0, 1), (15, 16), (16, 17), (299, 300), (63, 64), (40, 41), (132, 133))
FEW_DECODES: Final = ((0, 1), (40, 41), (132, 133))
FAR: Final = ((0, 1), (2, 3), (0, 1))
FEW: Final = ((0, 5), (30, 31), (17, 50))
MIXED: Final = ((0, 5), (30, 31), (0, 40), (17, 50), (200, 201), (90, 97), (3, 4), (120, 300))
SMALL: Final = ((0, 4), (30, 31), (17, 20))
AFTER_SHARED: Final = ((36, 37), (32, 33), (50, 51))
# More requests than any tile has rows.
MANY: Final = tuple((length, length + 1) for length in range(40))
# (H, K, D): sizes of heads that models have, numbers of queries to a key as they have, more than one key head. A GPU's
# compiler takes seconds for each.
HEADS: Final = ((4, 4, 80), (10, 2, 96), (12, 2, 112), (16, 2, 128), (32, 8, 64), (4, 2, 256))

QUANTIZED_TYPES: Final = {kind: str(kind).removeprefix("torch.") for kind in LARGEST_CODE}


def attention_cases() -> NamedCases:
    yield "one token", _attention(Paging(((0, 1),)), (9, 3, 64))
    yield "decode one row", _attention(Paging(((249, 250),)), (14, 2, 64))
    yield "decode, 3 queries a key", _attention(Paging(DECODE), (9, 3, 64))
    yield "decode, 7 queries a key", _attention(Paging(DECODE), (14, 2, 64))
    yield "decode, one key head", _attention(Paging(DECODE, page_tokens=7), (8, 1, 128))
    yield "decode, equal lengths", _attention(Paging(((47, 48),) * 5), (4, 2, 96))
    yield "decode, window", _attention(Paging(DECODE), (4, 2, 64), window=20)
    yield "decode, window of few, soft cap", _attention(Paging(FEW_DECODES), (4, 2, 32), window=5, soft_cap=3.0)
    yield "decode, 20 queries a key", _attention(Paging(FEW_DECODES), (20, 1, 32))
    yield (
        "decode, long, window, soft cap",
        _attention(Paging(((1899, 1900), (40, 41))), (2, 1, 32), window=700, soft_cap=3.0),
    )
    yield "decode, long", _attention(Paging(((2999, 3000), (1499, 1500), (4099, 4100))), (4, 2, 64))
    yield "prefill", _attention(Paging(((0, 37),)), (4, 4, 80))
    yield "prefill, several", _attention(Paging(((0, 33), (0, 2), (0, 16))), (6, 2, 96))
    yield "prefill after a cached prefix", _attention(Paging(((64, 333), (5, 7))), (9, 3, 64))
    yield "prefill after a long prefix", _attention(Paging(((1400, 1421),)), (4, 2, 32))
    yield "prefill, window", _attention(Paging(((0, 90), (200, 290))), (4, 2, 64), window=33)
    # Blocks of queries and of keys that see each other whole, and whose edges no register meets.
    yield (
        "prefill, wide window, 7 queries a key",
        _attention(Paging(((0, 170),)), (14, 2, 32), window=120, soft_cap=3.0),
    )
    yield "prefill, window of one", _attention(Paging(((0, 9), (9, 20))), (2, 1, 16), window=1)
    # Scores beyond +-88, of which float32 has no exponentials: of the only key that a query sees, and of several.
    for name, soft_cap in (("large scores", None), ("soft cap of large scores", 3.0)):
        for step, spans in (("decode", FAR), ("prefill", ((0, 3), (5, 8)))):
            yield f"{step}, {name}", _attention(Paging(spans), (9, 3, 64), soft_cap=soft_cap, size=100.0)
    for heads in HEADS:
        name = f"{heads[0]} queries to {heads[1]} keys of {heads[2]}"
        yield f"decode, {name}", _attention(Paging(FEW_DECODES), heads)
        yield f"decode, {name}, window, soft cap", _attention(Paging(FEW_DECODES), heads, window=20, soft_cap=3.0)
        yield f"mixed, {name}", _attention(Paging(SMALL), heads)
    yield "decode, soft cap", _attention(Paging(FEW_DECODES), (6, 2, 64), soft_cap=3.0)
    yield "decode, a prefix in common", _attention(Paging(AFTER_SHARED, shared=2), (4, 2, 32))
    yield "prefill after a prefix in common", _attention(Paging(((32, 37), (40, 45)), shared=2), (4, 2, 32))
    yield "decode, many rows", _attention(Paging(MANY), (2, 1, 16))
    yield "mixed, many rows", _attention(Paging(((0, 2), *MANY)), (2, 1, 16))
    yield "prefill, many queries", _attention(Paging(((0, 520),)), (2, 1, 16))
    yield "decode, pages of one token", _attention(Paging(FEW_DECODES, page_tokens=1), (4, 2, 32))
    yield "prefill, pages of 7 tokens", _attention(Paging(((0, 30), (9, 20)), page_tokens=7), (4, 2, 32))
    for page_tokens in (32, 64, 128):
        yield f"decode, pages of {page_tokens} tokens", _attention(Paging(FEW_DECODES, page_tokens), (4, 2, 32))
    yield "mixed, pages of 128 tokens", _attention(Paging(SMALL, page_tokens=128), (4, 2, 32))
    yield "mixed", _attention(Paging(MIXED), (9, 3, 64))
    yield "mixed, 20 queries a key", _attention(Paging(FEW), (40, 2, 32))
    # A multiple of no register of AVX-512: what is read of a head fills its last one only in part.
    yield "mixed, head size 72", _attention(Paging(FEW), (6, 2, 72))
    yield "mixed, pages of one token", _attention(Paging(MIXED, page_tokens=1), (4, 2, 32))
    yield "mixed, head size 256, soft cap", _attention(Paging(MIXED), (8, 4, 256), soft_cap=5.0)
    yield "mixed, window, soft cap", _attention(Paging(MIXED, page_tokens=32), (4, 2, 128), window=24, soft_cap=2.0)


def quantized_attention_cases() -> NamedCases:
    """With pages of 8 bits."""
    for kind, name in QUANTIZED_TYPES.items():
        yield f"{name} pages, one token", _attention(Paging(((0, 1),)), (9, 3, 64), quantized_as=kind)
        yield f"{name} pages, decode", _attention(Paging(FEW_DECODES, page_tokens=7), (14, 2, 64), quantized_as=kind)
        yield f"{name} pages, decode, long", _attention(Paging(((1199, 1200), (40, 41))), (4, 2, 96), quantized_as=kind)
        yield f"{name} pages, prefill", _attention(Paging(((0, 37), (0, 2))), (4, 4, 80), quantized_as=kind)
        yield (
            f"{name} pages, mixed, window, soft cap",
            _attention(Paging(FEW, page_tokens=32), (4, 2, 128), window=24, soft_cap=2.0, quantized_as=kind),
        )


def attention_case(
    name: str,
    paging: Paging,
    heads: tuple[int, int, int],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    quantized_as: torch.dtype | None = None,
) -> Case:
    """Returns a case at a model's heads, for whoever checks more than `attention_cases`. Arguments: as `_attention`."""
    return Case(
        "attention", name, _attention(paging, heads, window=window, soft_cap=soft_cap, quantized_as=quantized_as)
    )


def _attention(
    paging: Paging,
    heads: tuple[int, int, int],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    quantized_as: torch.dtype | None = None,
    size: float = 1.0,
) -> Callable[[Draw], Inputs]:
    """heads: (H, K, D). quantized_as: the type of pages of 8 bits. size: of the queries."""
    num_heads, num_kv_heads, head_dim = heads

    def build(draw: Draw) -> Inputs:
        metadata = paging.metadata(draw)
        kv_pages = paging.pool(draw, num_kv_heads, head_dim, quantized_as)
        paging.fill(kv_pages, metadata, draw)
        # As the rope op leaves it: a view of the projected heads.
        query = draw.normal(paging.num_tokens, num_heads + 2 * num_kv_heads, head_dim, scale=size)[:, :num_heads]
        settings = {"scale": head_dim**-0.5 * 1.5, "window": window, "soft_cap": soft_cap}
        return Inputs((query, kv_pages, metadata), settings)

    return build


def rope_cases() -> NamedCases:
    yield "one token", _rope(Paging(((41, 42),)), (9, 3, 64), 64)
    yield "decode", _rope(Paging(DECODE), (14, 2, 64), 64)
    yield "mixed", _rope(Paging(MIXED, page_tokens=7), (4, 4, 80), 80)
    yield "part of the head", _rope(Paging(FEW), (6, 2, 96), 24)
    yield "part of the head, one token", _rope(Paging(((0, 1),)), (8, 1, 256), 64)
    yield "no rotation", _rope(Paging(FEW), (4, 2, 128), 0)
    for heads in HEADS:
        yield f"{heads[0]} queries and {heads[1]} keys of {heads[2]}", _rope(Paging(SMALL), heads, heads[2])
    yield "many tokens", _rope(Paging(((0, 290),)), (2, 1, 16), 16)


def quantized_rope_cases() -> NamedCases:
    """With pages of 8 bits."""
    for kind, name in QUANTIZED_TYPES.items():
        yield f"{name} pages, one token", _rope(Paging(((41, 42),)), (9, 3, 64), 64, quantized_as=kind)
        yield f"{name} pages, mixed", _rope(Paging(FEW, page_tokens=7), (4, 4, 80), 80, quantized_as=kind)
        yield f"{name} pages, part of the head", _rope(Paging(FEW), (6, 2, 96), 24, quantized_as=kind)
        yield (
            f"{name} pages, no rotation, zeros",
            _rope(Paging(FEW_DECODES), (4, 2, 128), 0, quantized_as=kind, zeros=True),
        )


def _rope(
    paging: Paging,
    heads: tuple[int, int, int],
    rotary_dim: int,
    *,
    quantized_as: torch.dtype | None = None,
    zeros: bool = False,
) -> Callable[[Draw], Inputs]:
    """zeros: the first token's keys and values are."""
    num_heads, num_kv_heads, head_dim = heads

    def build(draw: Draw) -> Inputs:
        metadata = paging.metadata(draw)
        # The view drops a column, so that tokens are further apart than their heads are long.
        qkv = draw.normal(paging.num_tokens, (num_heads + 2 * num_kv_heads) * head_dim + 8)[:, :-8]
        qkv = qkv.view(paging.num_tokens, -1, head_dim)
        if zeros:
            qkv[0, num_heads:] = 0
        cos, sin = _angles(draw, metadata.positions, rotary_dim) if rotary_dim else (None, None)
        kv_pages = paging.pool(draw, num_kv_heads, head_dim, quantized_as)
        return Inputs((qkv, cos, sin, kv_pages, metadata.slots), {"num_heads": num_heads})

    return build


def _angles(draw: Draw, positions: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    # A base of the case's own: what is remembered of another's angles is wrong.
    base = 1e4 * (1 + torch.rand(1, generator=draw.generator))
    frequencies = base ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.outer(positions.cpu().float(), frequencies).repeat(1, 2)
    # Both in one table, so that tokens are further apart than their angles are many.
    table = draw.float(torch.cat((angles.cos(), angles.sin()), dim=1))
    return table[:, :rotary_dim], table[:, rotary_dim:]
