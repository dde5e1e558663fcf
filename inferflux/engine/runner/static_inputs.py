"""Inputs of decode steps at addresses that never change, for what was recorded and reads them there.

Knows batches; not what is recorded, nor how.
"""

from typing import NamedTuple

import torch

from inferflux.engine.runner.inputs import Batch
from inferflux.kernels.metadata import AttentionMetadata


class StaticInputs(NamedTuple):
    """A step whose rows hold one token each. indices: all of its tokens. All of it must live as long as a recording."""

    token_ids: torch.Tensor
    metadata: AttentionMetadata
    indices: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.metadata.num_rows

    def first(self, size: int, length: int) -> "StaticInputs":
        """The first `size` rows; to whoever asks on the host, each is `length` tokens long."""
        metadata = self.metadata
        view = AttentionMetadata(
            query_starts=metadata.query_starts[: size + 1],
            kv_lengths=metadata.kv_lengths[:size],
            page_table=metadata.page_table[:size],
            slots=metadata.slots[:size],
            positions=metadata.positions[:size],
            query_lengths_host=(1,) * size,
            kv_lengths_host=(length,) * size,
        )
        return StaticInputs(self.token_ids[:size], view, self.indices[:size])

    def fill(self, batch: Batch) -> None:
        """Copies the batch in, its first row once more for every row that is missing."""
        given, target = batch.tensors.metadata, self.metadata
        num_rows, num_pages = given.num_rows, given.page_table.shape[1]
        pairs = [
            (self.token_ids, batch.tensors.token_ids),
            (target.kv_lengths, given.kv_lengths),
            (target.page_table[:, :num_pages], given.page_table),
            (target.slots, given.slots),
            (target.positions, given.positions),
        ]
        for fixed, values in pairs:
            fixed[:num_rows].copy_(values)
            if num_rows < self.num_rows:
                fixed[num_rows:].copy_(values[:1].expand(self.num_rows - num_rows, *values.shape[1:]))


def static_inputs(size: int, num_pages: int, device: torch.device) -> StaticInputs:
    """Rows that hold one token each, in slot 0 of page 0."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    metadata = AttentionMetadata(
        query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
        kv_lengths=zeros(size, dtype=torch.int32).fill_(1),
        page_table=zeros(size, num_pages, dtype=torch.int32),
        slots=zeros(size),
        positions=zeros(size),
        query_lengths_host=(1,) * size,
        kv_lengths_host=(1,) * size,
    )
    return StaticInputs(zeros(size), metadata, torch.arange(size, device=device))
