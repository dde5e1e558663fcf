"""Small host arrays to the device and small results back, each in one copy.

On the CPU nothing is copied: tensors share the arrays' memory. Elsewhere the arrays travel side by side in one pinned
buffer, and results come back as one vector, because every separate copy costs more than the bytes in it. Knows no
request and no model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

# Triton and vector loads want each array to start on such a boundary.
ALIGNMENT = 16
_TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}
_NUMPY_DTYPES = {torch.int64: np.int64, torch.float32: np.float32}
# Integer types by element size: numpy has no bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: torch.Tensor) -> Array:
    """Returns a CPU tensor's elements as integers of their size, in the same memory: to copy them without torch."""
    return tensor.view(_BITS[tensor.element_size()]).numpy()


def to_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Returns the arrays (int64, int32, float32) as tensors on `device`, without waiting for it.

    On the CPU the tensors share memory with the arrays: leave those alone afterwards.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # The caching host allocator keeps the buffer from being used again before the copy has happened.
    staging = torch.empty(_packed_size(arrays), dtype=torch.uint8, pin_memory=True)
    pack(arrays, staging.numpy())
    return unpack(staging.to(device, non_blocking=True), arrays)


def start_to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[Array]]:
    """Starts copying tensors (int64 below 2**53 in size, float32) to the host, behind the work queued so far.

    The function returned waits for just that, and returns the values as arrays.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        arrays = [tensor.numpy() for tensor in tensors]
        return lambda: arrays
    values = join(tensors)
    landing = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    landing.copy_(values, non_blocking=True)
    landed = torch.cuda.Event()
    landed.record()

    def wait() -> list[Array]:
        landed.synchronize()
        return split(landing.numpy(), tensors)

    return wait


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns one float64 vector of all values; float64 holds float32 and integers below 2**53 exactly."""
    return torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors])


def split(values: npt.NDArray[np.float64], tensors: Sequence[torch.Tensor]) -> list[Array]:
    """Returns the arrays that `join` put into `values`, in the tensors' shapes and types."""
    parts = np.split(values, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [
        part.reshape(tensor.shape).astype(_NUMPY_DTYPES[tensor.dtype])
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def pack(arrays: Sequence[Array], buffer: npt.NDArray[np.uint8]) -> None:
    """Writes the arrays one after another into `buffer` (uint8), each on an aligned offset."""
    offset = 0
    for array in arrays:
        buffer[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        offset += _aligned(array.nbytes)


def unpack(buffer: torch.Tensor, arrays: Sequence[Array]) -> list[torch.Tensor]:
    """Returns views of `buffer` (uint8) that hold what `pack` wrote for arrays of these shapes and types."""
    tensors, offset = [], 0
    for array in arrays:
        part = buffer[offset : offset + array.nbytes].view(_TORCH_DTYPES[array.dtype.name])
        tensors.append(part.view(array.shape))
        offset += _aligned(array.nbytes)
    return tensors


def _packed_size(arrays: Sequence[Array]) -> int:
    return sum(_aligned(array.nbytes) for array in arrays)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
