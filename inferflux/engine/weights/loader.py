"""WeightLoader: from checkpoint tensors to the matrices the decoder computes with.

A weight is allocated once, in its final type and on its device, and its sources are read straight into it, through
a bounded buffer where they must be converted or cut. So loading never holds more than the weights and one buffer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from inferflux.dist import shares
from inferflux.dist.context import ParallelContext
from inferflux.engine.weights.safetensors_file import SafetensorsFile, TensorEntry
from inferflux.engine.weights.source import TensorSource, Weight
from inferflux.errors import ModelLoadError

BUFFER_BYTES = 4 * 1024 * 1024
# Tensors that an error names.
MAX_LISTED = 5
FLOAT_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Tensors(Protocol):
    """Open files, such as a `Checkpoint`'s, and what lies where in them by name."""

    @property
    def files(self) -> Sequence[SafetensorsFile]: ...

    @property
    def tensors(self) -> Mapping[str, tuple[SafetensorsFile, TensorEntry]]: ...


class _Part(NamedTuple):
    """Rows and columns of one checkpoint tensor."""

    source: TensorSource
    rows: slice
    columns: slice


class WeightLoader:
    """Loads weights of one checkpoint for one rank onto `device`, in `dtype` unless asked otherwise."""

    def __init__(self, checkpoint: Tensors, context: ParallelContext, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._context = context
        self.device = device

    def load(self, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns this rank's share of the weight: `[rows, columns]`, or `[rows]` for a vector."""
        result = torch.empty(self.shape(weight), dtype=dtype or self.dtype, device=self.device)
        matrix = result.view(result.shape[0], -1)
        first = 0
        for part in self._parts(weight):
            self._fill(part, matrix[first : first + _length(part.rows)])
            first += _length(part.rows)
        matrix[first:].zero_()
        return result

    def blocks(self, weight: Weight) -> Iterator[torch.Tensor]:
        """Yields what `load` returns of a matrix in blocks of whole rows, top to bottom; the next overwrites the last.

        For a caller that turns them into something smaller: no more than a buffer is held beside that.
        """
        num_columns = self.shape(weight)[1]
        step = max(1, BUFFER_BYTES // (num_columns * self.dtype.itemsize))
        buffer = torch.empty((step, num_columns), dtype=self.dtype, device=self.device)
        for part in self._parts(weight):
            for first in range(part.rows.start, part.rows.stop, step):
                rows = slice(first, min(first + step, part.rows.stop))
                block = buffer[: _length(rows)]
                self._fill(part._replace(rows=rows), block)
                yield block
        num_missing = self.shape(weight)[0] - sum(_length(part.rows) for part in self._parts(weight))
        if num_missing:
            yield buffer.new_zeros((num_missing, num_columns))

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Returns the shape of this rank's share; where a vocabulary does not come out even, zeros fill it up."""
        parts = list(self._parts(weight))
        num_rows = sum(_length(part.rows) for part in parts)
        if weight[0].split == "vocabulary":
            num_rows = -(-weight[0].shape[0] // self._context.size)
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
        rank, size = self._context.rank, self._context.size
        if source.split == "vocabulary":
            return [shares.padded(source.shape[0], rank, size)], columns
        lengths = source.sections or (source.shape[0],)
        sections, start = [], 0
        for length, num_heads in zip(lengths, source.heads or (0,) * len(lengths), strict=True):
            part = slice(0, length)
            if source.split == "column":
                part = self._part(length, num_heads, source.name)
            sections.append(slice(start + part.start, start + part.stop))
            start += length
        return sections, columns

    def _part(self, num_rows: int, num_heads: int, name: str) -> slice:
        """Returns this rank's rows of a section; num_heads: see TensorSource.heads."""
        if num_heads == 0:
            return self._context.split(num_rows, f"{name}: rows")
        heads = shares.repeated(num_heads, self._context.rank, self._context.size, f"{name}: key/value heads")
        head_rows = num_rows // num_heads
        return slice(heads.start * head_rows, heads.stop * head_rows)


def check_tensors(checkpoint: Tensors, sources: Iterable[TensorSource], ignored: Callable[[str], bool]) -> None:
    """Raises ModelLoadError unless the checkpoint holds exactly the sources, by name, shape and a supported type.

    ignored: tells of a name that is left over whether it may be.
    """
    needed = {source.name: source for source in sources}
    where = checkpoint.files[0].path.parent
    missing = [name for name in needed if name not in checkpoint.tensors]
    if missing:
        raise ModelLoadError(f"{where}: the checkpoint lacks {listed(missing)}")
    leftover = [name for name in checkpoint.tensors if name not in needed and not ignored(name)]
    if leftover:
        raise ModelLoadError(f"{where}: the checkpoint has tensors this model does not use: {listed(leftover)}")
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
    """Copies rows and columns of a tensor into destination [rows, columns], converting its type. Reads nothing else."""
    dtype, num_rows = FLOAT_DTYPES[entry.dtype], _length(rows)
    if not num_rows:
        return
    if destination.device.type == "cpu" and destination.dtype == dtype:
        _read(file, entry, rows, columns, destination)
        return
    row_bytes = _length(columns) * dtype.itemsize
    buffer = torch.empty((min(num_rows, max(1, BUFFER_BYTES // row_bytes)), _length(columns)), dtype=dtype)
    for first in range(0, num_rows, len(buffer)):
        chunk = buffer[: num_rows - first]
        _read(file, entry, slice(rows.start + first, rows.start + first + len(chunk)), columns, chunk)
        destination[first : first + len(chunk)].copy_(chunk)


def _read(file: SafetensorsFile, entry: TensorEntry, rows: slice, columns: slice, destination: torch.Tensor) -> None:
    """Reads rows and columns into destination [rows, columns], contiguous on the CPU and of the tensor's own type."""
    item_bytes, width = destination.dtype.itemsize, math.prod(entry.shape[1:])
    offset, view = entry.start + (rows.start * width + columns.start) * item_bytes, _bytes(destination)
    if _length(columns) == width:
        file.read_into(view, offset)
        return
    row_bytes = _length(columns) * item_bytes
    for row in range(_length(rows)):
        file.read_into(view[row * row_bytes : (row + 1) * row_bytes], offset + row * width * item_bytes)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)


def listed(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(f"{name!r:.200}" for name in names[:MAX_LISTED]) + rest
