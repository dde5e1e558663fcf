"""One safetensors file: its header, checked before anything is believed, and reads of whole rows.

The format (huggingface/safetensors, "Format"): 8 bytes little-endian header length, the header as a JSON object of
name -> {dtype, shape, data_offsets}, then the data, which the tensors tile without holes or overlaps.
Reads with pread, not mmap: what has been read costs no resident memory, and a file that shrinks under us is an
error, not a SIGBUS. Knows no model; no torch.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from inferflux.errors import ModelLoadError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. start, stop: its bytes in the file. dtype: a key of DTYPE_BYTES."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open file. `entries` are its tensors by name. Close it with `close`. Raises ModelLoadError when not sound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ModelLoadError(f"{path}: is not a file")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be opened: {error.strerror or error}") from error
        try:
            self.size = os.fstat(self._fd).st_size
            self.header = self._read_header()
            self.entries = _parse_header(self.header, self.size, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def read_into(self, destination: memoryview, offset: int) -> None:
        """Fills `destination` (bytes) from `offset` of the file. Raises ModelLoadError when the file is shorter."""
        done = 0
        while done < len(destination):
            try:
                count = os.preadv(self._fd, [destination[done:]], offset + done)
            except OSError as error:
                raise ModelLoadError(f"{self.path}: cannot be read: {error.strerror or error}") from error
            if count == 0:
                raise ModelLoadError(f"{self.path}: ends at byte {offset + done}, before its data does")
            done += count

    def _read_header(self) -> bytes:
        if self.size < 8:
            raise ModelLoadError(f"{self.path}: is not a safetensors file: has {self.size} bytes, needs at least 8")
        prefix = bytearray(8)
        self.read_into(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, self.size - 8):
            raise ModelLoadError(f"{self.path}: its header should have {length} bytes, but only {self.size - 8} follow")
        header = bytearray(length)
        self.read_into(memoryview(header), 8)
        return bytes(header)


def _parse_header(header: bytes, file_size: int, path: Path) -> dict[str, TensorEntry]:
    try:
        tensors = json.loads(header, object_pairs_hook=_unique_object)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(tensors, dict):
        raise ModelLoadError(f"{path}: its header must be a JSON object")
    tensors.pop("__metadata__", None)
    data_start = 8 + len(header)
    entries = {name: _parse_entry(name, value, data_start, path) for name, value in tensors.items()}
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != expected:
            raise ModelLoadError(f"{path}: tensor {name!r:.200} starts at byte {entry.start}, must start at {expected}")
        expected = entry.stop
    if expected != file_size:
        raise ModelLoadError(f"{path}: is damaged: its tensors end at byte {expected}, the file at {file_size}")
    return entries


def _unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def _parse_entry(name: str, value: object, data_start: int, path: Path) -> TensorEntry:
    where = f"{path}: tensor {name!r:.200}"
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelLoadError(f"{where}: dtype must be one of {', '.join(DTYPE_BYTES)} (got {dtype!r:.40})")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelLoadError(f"{where}: shape must be at most {MAX_DIMENSIONS} sizes (got {shape!r:.80})")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelLoadError(f"{where}: data_offsets must be two increasing offsets (got {offsets!r:.80})")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise ModelLoadError(f"{where}: {dtype} {shape!r:.80} takes {num_bytes} bytes, not those at {offsets!r:.80}")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
