"""RowTable: the rows of a matrix one by one, read from the panels that products read: tied embeddings need no copy."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from inferflux.kernels.native.panels import PANEL, Panels
from inferflux.kernels.quantized_weight import QuantizedWeight, Scheme

Array = npt.NDArray[Any]
_SCHEMES: Final[dict[torch.dtype, Scheme]] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
# A panel holds a row in pieces: as many columns as are together.
_PIECES: Final = {2: torch.int16, 4: torch.int32}


class RowTable:
    """panels: of floats, int8 or fp8."""

    def __init__(self, panels: Panels) -> None:
        assert panels.values.dtype != torch.uint8, "two columns of 4 bits are not side by side"
        pieces = panels.values.view(torch.uint8).view(*panels.values.shape[:2], -1)
        self.num_outputs, self.num_inputs = panels.num_outputs, panels.num_inputs
        self._panels = panels
        self._bits = np.dtype(f"i{panels.values.itemsize}")
        # [panels, pieces, 16]
        self._pieces = pieces.view(_PIECES[pieces.shape[2] // PANEL]).numpy()
        # [out + what fills the last panel up, 1]
        self.scales = None if panels.scales is None else panels.scales.view(-1, 1).numpy()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values. A row's product with its scale, if there are any, is float32."""
        return self._panels.values.dtype

    def take(self, rows: Array) -> Array:
        """rows: int64 [n]. Returns the bits of their values as integers [n, in].

        Of 576 columns in bfloat16 it takes 8 us for one row, 46 for 32 and 260 for 512, where those of a matrix in rows
        take 3, 8 and 41 (one core of a Zen 5 EPYC, caches cold).
        """
        if len(rows) == 1:  # by an array of indices it takes 5 us longer
            panel, row = divmod(int(rows[0]), PANEL)
            pieces = self._pieces[None, panel, :, row]
        else:
            pieces = self._pieces[rows // PANEL, :, rows % PANEL]
        return np.ascontiguousarray(np.ascontiguousarray(pieces).view(self._bits)[:, : self.num_inputs])

    def select(self, rows: torch.Tensor) -> torch.Tensor | QuantizedWeight:
        """rows: int64 [n]. Returns them copied, as the matrix was before it was packed."""
        numbers = rows.numpy()
        values = torch.from_numpy(self.take(numbers)).view(self.dtype)
        if self.scales is None:
            return values
        scales = torch.from_numpy(self.scales.take(numbers, axis=0))
        return QuantizedWeight(_SCHEMES[self.dtype], values, scales, self.num_inputs)
