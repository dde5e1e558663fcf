"""Embedding: token ids to vectors, the vocabulary shared among ranks."""

import torch

from inferflux.dist.context import ParallelContext
from inferflux.kernels.quantized_weight import QuantizedWeight, dequantize


class Embedding:
    """weight [V / ranks, hidden]: this rank's rows of the table, as they are or quantised.

    What is looked up has `dtype` and is multiplied by `scale`.
    """

    def __init__(
        self, weight: torch.Tensor | QuantizedWeight, scale: float, context: ParallelContext, dtype: torch.dtype
    ) -> None:
        self._weight = weight
        self._dtype = dtype
        # Rounded to the model's type before it multiplies, as the models that have a scale were trained.
        self._scale = float(torch.tensor(scale, dtype=dtype))
        self._context = context

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T]. Returns [T, hidden], a new tensor."""
        hidden = self._look_up(token_ids)
        return hidden if self._scale == 1.0 else hidden.mul_(self._scale)

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._context.size == 1:
            return self._rows(token_ids)
        num_rows = self._weight.num_outputs if isinstance(self._weight, QuantizedWeight) else self._weight.shape[0]
        rows = token_ids - self._context.rank * num_rows
        elsewhere = (rows < 0) | (rows >= num_rows)
        hidden = self._rows(rows.clamp_(0, num_rows - 1)).masked_fill_(elsewhere.unsqueeze(1), 0)
        return self._context.all_reduce(hidden)

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        if isinstance(self._weight, QuantizedWeight):
            return dequantize(self._weight.select(rows), torch.float32).to(self._dtype)
        return self._weight.index_select(0, rows)
