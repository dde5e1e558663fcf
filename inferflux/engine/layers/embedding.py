"""Embedding: token ids to vectors, the vocabulary shared among ranks."""

from collections.abc import Callable

import numpy as np
import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.transfer import Array, bits_of
from inferflux.kernels.native.row_table import RowTable
from inferflux.kernels.quantized_weight import QuantizedWeight, dequantize


class Embedding:
    """weight [V / ranks, hidden]: this rank's rows of the table, as they are, quantised, or where the output matrix
    keeps them.

    What is looked up has `dtype` and is multiplied by `scale`.
    """

    def __init__(
        self,
        weight: torch.Tensor | QuantizedWeight | RowTable,
        scale: float,
        context: ParallelContext,
        dtype: torch.dtype,
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

    def writer(self, hidden: torch.Tensor) -> Callable[[Array], None]:
        """Returns what writes the embeddings of tokens, int64 [T], into `hidden` [T, hidden], on one rank's CPU: what
        calling it returns, with less of torch."""
        weight, scale = self._weight, self._scale
        if isinstance(weight, torch.Tensor):
            table, bits = bits_of(weight), bits_of(hidden)

            def write(token_ids: Array) -> None:
                table.take(token_ids, axis=0, out=bits, mode="clip")

        elif isinstance(weight, RowTable) and weight.dtype == hidden.dtype:
            bits = bits_of(hidden)

            def write(token_ids: Array) -> None:
                bits[:] = weight.take(token_ids)

        elif isinstance(weight, RowTable) and weight.dtype == torch.int8 and hidden.dtype == torch.float32:
            row_scales, floats = weight.scales, hidden.numpy()
            assert row_scales is not None

            def write(token_ids: Array) -> None:
                np.multiply(weight.take(token_ids), row_scales.take(token_ids, axis=0), out=floats)

        elif isinstance(weight, QuantizedWeight) and weight.scheme == "int8" and hidden.dtype == torch.float32:
            values, scales, floats = weight.values.numpy(), weight.scales.numpy(), hidden.numpy()

            def write(token_ids: Array) -> None:
                np.multiply(values.take(token_ids, axis=0), scales.take(token_ids, axis=0), out=floats)

        else:

            def write(token_ids: Array) -> None:
                hidden.copy_(self._rows(torch.from_numpy(token_ids)))

        def write_scaled(token_ids: Array) -> None:
            write(token_ids)
            hidden.mul_(scale)

        return write if scale == 1.0 else write_scaled

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._context.size == 1:
            return self._rows(token_ids)
        num_rows = len(self._weight) if isinstance(self._weight, torch.Tensor) else self._weight.num_outputs
        rows = token_ids - self._context.rank * num_rows
        elsewhere = (rows < 0) | (rows >= num_rows)
        hidden = self._rows(rows.clamp_(0, num_rows - 1)).masked_fill_(elsewhere.unsqueeze(1), 0)
        return self._context.all_reduce(hidden)

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        picked = weight.index_select(0, rows) if isinstance(weight, torch.Tensor) else weight.select(rows)
        return picked if isinstance(picked, torch.Tensor) else dequantize(picked, torch.float32).to(self._dtype)
