"""The words of the weight table: where a weight comes from and how ranks share it. No torch."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["replicated", "column", "row", "row_bias", "vocabulary"]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One checkpoint tensor, `[rows, columns]` or `[rows]`, and how ranks share it.

    split: `column` (output features: each rank takes its part of the rows), `row` (input features: its part of the
    columns), `row_bias` (the bias after a `row` matrix: the first rank adds it, the others zeros), `vocabulary` (each
    rank takes its part of the rows, with zeros where they do not come out even) or `replicated`.
    sections: the rows of each part that is cut on its own (a fused query-key-value tensor has three); empty: one.
    heads: for each section, how many key/value heads it is made of, which ranks may have copies of; 0 where each rank
    has rows of its own; empty: all 0.
    """

    name: str
    shape: tuple[int, ...]
    split: Split = "replicated"
    sections: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()


# One matrix or vector of the decoder: its sources stacked by rows.
Weight = tuple[TensorSource, ...]
