"""TrialContext: what a trial runs on (device, dtype, lock, event sink), and the state of the device after a failure.

Knows no knob.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from inferflux.kernels.backends import PACKED_OPS, find_backend
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.tune.chain import CHAIN, Chain


class DeviceLock(Protocol):
    """Several processes may compile and check at once; timing needs exclusive access."""

    def shared(self) -> AbstractContextManager[None]: ...
    def exclusive(self) -> AbstractContextManager[None]: ...


class DeviceLostError(Exception):
    """A kernel has left the device in a state in which this process can compute nothing else."""


@dataclass(frozen=True)
class TrialContext:
    """emit(event, **facts): reports what happens, as it happens. check_until: the time.time() after which unchecked
    entries are left out. toy: timings mean nothing."""

    device: torch.device
    dtype: torch.dtype
    lock: DeviceLock
    emit: Callable[..., None]
    check_until: float
    toy: bool = False

    def dtype_of(self, op: str) -> torch.dtype:
        return torch.float32 if op == "sampling" else self.dtype

    def free(self) -> None:
        """Returns cached memory to the device, for the process that times."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def demand_device(self) -> None:
        """Raises DeviceLostError where a failure was more than a refused launch."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise DeviceLostError(str(error)) from error


def implementation(op: str, sizes: Sizes, packed: Any = None) -> Any:
    """Returns the Triton op with these sizes, or a `Chain`. packed: weights packed before; all sizes share them."""
    if op == CHAIN:
        return Chain(sizes)
    found = find_backend("triton").find(op)
    if op not in PACKED_OPS:
        return partial(found, sizes=sizes)
    return SimpleNamespace(
        pack=found.pack if packed is None else lambda *_: packed, run=partial(found.run, sizes=sizes)
    )


def error_line(error: BaseException | None) -> str:
    """Returns an error's type and first line, cut to 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
