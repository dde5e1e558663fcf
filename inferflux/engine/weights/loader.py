"""WeightLoader: from checkpoint tensors to the matrices the decoder computes with.

A weight is allocated once, in its final type and on its device, and its sources are read straight into it, through
a bounded buffer where they must be converted or cut. So loading never holds more than the weights and one buffer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.weights.checkpoint import Checkpoint
from inferflux.engine.weights.safetensors_file import SafetensorsFile, TensorEntry
from inferflux.engine.weights.source import TensorSource, Weight
from inferflux.errors import ModelLoadError

BUFFER_BYTES = 4 * 1024 * 1024
FLOAT_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class _Part(NamedTuple):
    """Rows and columns of one checkpoint tensor."""

    source: TensorSource
    rows: slice
    columns: slice


class WeightLoader:
    """Loads weights of one checkpoint for one rank onto `device`, in `dtype` unless asked otherwise."""

    def __init__(
        self, checkpoint: Checkpoint, context: ParallelContext, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._context = context
        self._device = device

    def load(self, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns this rank's share of the weight: `[rows, columns]`, or `[rows]` for a vector."""
        result = torch.empty(self.shape(weight), dtype=dtype or self.dtype, device=self._device)
        matrix = result.view(result.shape[0], -1)
        first = 0
        for part in self._parts(weight):
            self._fill(part, matrix[first : first + _length(part.rows)])
            first += _length(part.rows)
        return result

    def blocks(self, weight: Weight) -> Iterator[torch.Tensor]:
        """Yields what `load` returns of a matrix in blocks of whole rows, top to bottom; the next overwrites the last.

        For a caller that turns them into something smaller: no more than a buffer is held beside that.
        """
        num_columns = self.shape(weight)[1]
        step = max(1, BUFFER_BYTES // (num_columns * self.dtype.itemsize))
        buffer = torch.empty((step, num_columns), dtype=self.dtype, device=self._device)
        for part in self._parts(weight):
            for first in range(part.rows.start, part.rows.stop, step):
                rows = slice(first, min(first + step, part.rows.stop))
                block = buffer[: _length(rows)]
                self._fill(part._replace(rows=rows), block)
                yield block

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Returns the shape of this rank's share."""
        parts = list(self._parts(weight))
        num_rows = sum(_length(part.rows) for part in parts)
        return (num_rows, _length(parts[0].columns)) if len(weight[0].shape) == 2 else (num_rows,)

    def _parts(self, weight: Weight) -> Iterator["_Part"]:
        for source in weight:
            sections, columns = self._cut(source)
            for rows in sections:
                yield _Part(source, rows, columns)

    def _fill(self, part: "_Part", destination: torch.Tensor) -> None:
        if part.source.split == "row_bias" and self._context.rank > 0:
            destination.zero_()
        else:
            _copy(*self._checkpoint.tensors[part.source.name], part.rows, part.columns, destination)

    def _cut(self, source: TensorSource) -> tuple[list[slice], slice]:
        """Returns which rows (by section) and which columns of a source are this rank's."""
        columns = slice(0, math.prod(source.shape[1:]))
        if source.split == "row":
            return [slice(0, source.shape[0])], self._context.split(columns.stop, f"{source.name}: columns")
        sections, start = [], 0
        for length in source.sections or (source.shape[0],):
            part = self._context.split(length, f"{source.name}: rows") if source.split == "column" else slice(0, length)
            sections.append(slice(start + part.start, start + part.stop))
            start += length
        return sections, columns


def check_tensors(checkpoint: Checkpoint, sources: Iterable[TensorSource], ignored: Callable[[str], bool]) -> None:
    """Raises ModelLoadError unless the checkpoint holds exactly the sources, by name, shape and a supported type.

    ignored: tells of a name that is left over whether it may be.
    """
    needed = {source.name: source for source in sources}
    where = checkpoint.files[0].path.parent
    missing = [name for name in needed if name not in checkpoint.tensors]
    if missing:
        raise ModelLoadError(f"{where}: the checkpoint lacks {_listed(missing)}")
    leftover = [name for name in checkpoint.tensors if name not in needed and not ignored(name)]
    if leftover:
        raise ModelLoadError(f"{where}: the checkpoint has tensors this model does not use: {_listed(leftover)}")
    for name, source in needed.items():
        file, entry = checkpoint.tensors[name]
        if entry.shape != source.shape:
            raise ModelLoadError(f"{file.path}: tensor {name!r}: shape must be {source.shape} (got {entry.shape})")
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelLoadError(
                f"{file.path}: tensor {name!r}: dtype must be one of {', '.join(FLOAT_DTYPES)} (got {entry.dtype}); "
                "quantised checkpoints are not supported"
            )


def _copy(file: SafetensorsFile, entry: TensorEntry, rows: slice, columns: slice, destination: torch.Tensor) -> None:
    """Copies rows and columns of a tensor into destination [rows, columns], converting its type."""
    dtype, width = FLOAT_DTYPES[entry.dtype], math.prod(entry.shape[1:])
    row_bytes = width * dtype.itemsize
    offset = entry.start + rows.start * row_bytes
    if destination.device.type == "cpu" and destination.dtype == dtype and _length(columns) == width:
        file.read_into(_bytes(destination), offset)
        return
    num_rows = _length(rows)
    buffer = torch.empty((min(num_rows, max(1, BUFFER_BYTES // row_bytes)), width), dtype=dtype)
    for first in range(0, num_rows, len(buffer)):
        chunk = buffer[: num_rows - first]
        file.read_into(_bytes(chunk), offset + first * row_bytes)
        destination[first : first + len(chunk)].copy_(chunk[:, columns])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)


def _listed(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"{name!r:.200}" for name in names[:limit]) + rest
