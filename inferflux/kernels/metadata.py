"""AttentionMetadata: where one step's tokens stand among the cached ones.

Built once per step by the runner, read by every layer's attention. Knows no model and no request.

Shapes, here and in every kernel:
  T tokens computed in this step · B rows (requests) in this step · P pages in the pool
  H query heads · K key/value heads (H % K == 0) · D head size · N page_tokens
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's geometry. The tokens of row `i` are `query_starts[i]:query_starts[i+1]`, in order of position.

    query_starts: int32 [B + 1], first token of each row among the step's T tokens; the last entry is T.
    kv_lengths: int32 [B], tokens in the row's context once this step's own are written (own tokens included).
    page_table: int32 [B, max pages of a row]; entry (i, j) holds positions j*N to (j+1)*N - 1 of row i.
        Entries past a row's own pages are arbitrary but valid page numbers.
    slots: int64 [T], where each token's key and value go: page * N + offset in the page.
    positions: int64 [T], each token's position in its row; the last of row i is kv_lengths[i] - 1.
    query_lengths_host, kv_lengths_host: the same lengths as plain ints, so that CPU kernels and launch
        heuristics never wait for a device. While a step is recorded as a CUDA graph, each row's is the longest there
        could be.
    derived: what a kernel works out from this geometry in the step's first layer and wants again in the next ones,
        under a key of its own. Nobody else reads it.
    """

    query_starts: torch.Tensor
    kv_lengths: torch.Tensor
    page_table: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    query_lengths_host: tuple[int, ...]
    kv_lengths_host: tuple[int, ...]
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return len(self.query_lengths_host)

    @property
    def num_tokens(self) -> int:
        return int(self.slots.shape[0])

    @property
    def max_query_length(self) -> int:
        return max(self.query_lengths_host, default=0)

    @property
    def max_kv_length(self) -> int:
        return max(self.kv_lengths_host, default=0)
