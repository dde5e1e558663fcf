"""Pooler: turns a request's hidden states into its vector, of length 1. Knows slots and rows; no model.

`last` takes the last token's state. `mean` adds up the states of all tokens as chunks of the prompt are computed, so it
keeps one sum per slot.
"""

from typing import NamedTuple

import numpy as np
import torch

from inferflux.engine.runner.inputs import Batch
from inferflux.engine.step import Row, RowStart
from inferflux.engine.transfer import to_device
from inferflux.sampling_params import Pooling

Tensor = torch.Tensor


class Vectors(NamedTuple):
    """values float32 [E, hidden], of the rows with these numbers."""

    rows: list[int]
    values: Tensor


class Pooler:
    """One runner's. Slots whose request is not pooled cost nothing."""

    def __init__(self) -> None:
        self._poolings: dict[int, Pooling] = {}
        self._sums: dict[int, Tensor] = {}

    def begin(self, start: RowStart) -> None:
        self._poolings.pop(start.slot, None)
        self._sums.pop(start.slot, None)
        if start.sampling.pooling is not None:
            self._poolings[start.slot] = start.sampling.pooling

    def pool(self, sampled: Tensor, pooled: Tensor, rows: list[Row], batch: Batch) -> Vectors | None:
        """sampled [S or more, hidden]: first the states of batch.sampled's last tokens; pooled [P, hidden]: those of
        batch.pooled's tokens.

        Returns the vectors that are complete with this step, None when none is.
        """
        if not self._poolings:
            return None
        for span in batch.pooled:
            part = pooled[span.first : span.first + span.num_tokens].float().sum(dim=0)
            slot = rows[span.row].slot
            before = self._sums.get(slot)
            self._sums[slot] = part if before is None else before + part
        ready = [place for place, row in enumerate(batch.sampled) if rows[row].slot in self._poolings]
        if not ready:
            return None
        numbers = [batch.sampled[place] for place in ready]
        (places,) = to_device([np.array(ready, np.int64)], sampled.device)
        values = sampled.index_select(0, places).float()
        for place, number in enumerate(numbers):
            slot = rows[number].slot
            if self._poolings[slot] == "mean":
                # Its length will be 1: the sum points where the mean does.
                values[place] = self._sums.pop(slot)
        return Vectors(numbers, torch.nn.functional.normalize(values, dim=1))
