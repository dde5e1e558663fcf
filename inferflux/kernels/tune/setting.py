"""Where a trial takes place: the device, whose turn it is, who is told, and what a kernel may have done to it.

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


class Turns(Protocol):
    """Several processes may compile and check at once; who takes times is alone."""

    def shared(self) -> AbstractContextManager[None]: ...
    def alone(self) -> AbstractContextManager[None]: ...


class DeviceLostError(Exception):
    """A kernel has left the device so that nothing else can be computed in this process."""


@dataclass(frozen=True)
class Setting:
    """say(event, **facts): told what happens as it happens. check_until: when (time.time()) what is not checked yet is
    left out. toy: figures mean nothing."""

    device: torch.device
    dtype: torch.dtype
    turns: Turns
    say: Callable[..., None]
    check_until: float
    toy: bool = False

    def dtype_of(self, op: str) -> torch.dtype:
        return torch.float32 if op == "sampling" else self.dtype

    def free(self) -> None:
        """Gives memory back to whoever takes times."""
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
    """Returns Triton's op with these sizes, or the chain of some. packed: weights packed before, which are the same for
    all sizes."""
    if op == CHAIN:
        return Chain(sizes)
    found = find_backend("triton").find(op)
    if op not in PACKED_OPS:
        return partial(found, sizes=sizes)
    return SimpleNamespace(
        pack=found.pack if packed is None else lambda *_: packed, run=partial(found.run, sizes=sizes)
    )


def words(error: BaseException | None) -> str:
    """An error's first line, of a length to be read."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
