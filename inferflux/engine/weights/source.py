"""The words of the weight table: where a weight comes from and how ranks share it. No torch."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["replicated", "column", "row", "row_bias"]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One checkpoint tensor, `[rows, columns]` or `[rows]`, and how ranks share it.

    split: `column` (output features: each rank takes its part of the rows), `row` (input features: its part of the
    columns), `row_bias` (the bias after a `row` matrix: the first rank adds it, the others zeros) or `replicated`.
    sections: the rows of each part that is cut on its own (a fused query-key-value tensor has three); empty: one.
    """

    name: str
    shape: tuple[int, ...]
    split: Split = "replicated"
    sections: tuple[int, ...] = ()


# One matrix or vector of the decoder: its sources stacked by rows.
Weight = tuple[TensorSource, ...]
