"""ParallelContext: which rank this is, which part of a weight belongs to it, and the collectives.

Without a group, in a single process, every collective is a no-op, so callers need not distinguish. `launch` connects the
ranks; a rank that is gone or does not respond is an EngineDeadError. The collectives on `group` do not wait for the
device or look at values, so a CUDA graph can capture them; only `all_to_all` needs its sizes as plain numbers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from inferflux.dist import shares
from inferflux.dist.faults import LostRank
from inferflux.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """rank: 0 <= rank < size. device: where this rank computes.

    group: for tensors on `device`; None: a single process. control: a gloo group of the same ranks, for host memory
    (see `channel`).
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None
    control: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"distributed: 0 <= rank < world_size failed: rank {self.rank}, world_size {self.size}")

    def split(self, length: int, name: str) -> slice:
        """Returns this rank's part of a dimension. Raises ConfigError if it cannot be divided evenly."""
        return shares.even(length, self.rank, self.size, name)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over ranks; may overwrite `tensor`."""
        if self.group is not None:
            with LostRank():
                torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Returns all ranks' tensors (of the same shape) concatenated along `dim`, in rank order."""
        if self.group is None:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with LostRank():
            torch.distributed.all_gather(parts, tensor, group=self.group)
        return torch.cat(parts, dim=dim)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns all ranks' tensors concatenated along the last dimension on rank 0, `tensor` itself on the others."""
        if self.group is None:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        with LostRank():
            torch.distributed.gather(tensor, parts, dst=0, group=self.group)
        return tensor if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns rank 0's tensor on every rank; overwrites `tensor` on the others."""
        if self.group is not None:
            with LostRank():
                torch.distributed.broadcast(tensor, 0, group=self.group)
        return tensor

    def all_reduce_min(self, numbers: Sequence[int]) -> list[int]:
        """Returns the minimum of each number over all ranks."""
        if self.control is None:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        with LostRank():
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=self.control)
        return values.tolist()

    def require_same(self, settings: Mapping[str, str]) -> None:
        """Raises ConfigError for the first setting whose values differ between ranks; all must give the same names."""
        numbers = [int.from_bytes(hashlib.sha256(value.encode()).digest()[:7]) for value in settings.values()]
        least = self.all_reduce_min([*numbers, *(-number for number in numbers)])
        for name, low, high in zip(settings, least, least[len(numbers) :], strict=False):
            if low != -high:
                raise ConfigError(f"{name}: must be the same on every rank (this one has {settings[name]:.80})")

    def all_to_all(self, rows: torch.Tensor, num_sent: list[int], num_received: list[int]) -> torch.Tensor:
        """Sends the first num_sent[0] rows to rank 0, the next num_sent[1] to rank 1, and so on; returns the rows sent
        to this rank, in rank order, num_received[i] of them from rank i."""
        if self.group is None:
            return rows
        received = rows.new_empty((sum(num_received), *rows.shape[1:]))
        with LostRank():
            torch.distributed.all_to_all_single(received, rows.contiguous(), num_received, num_sent, group=self.group)
        return received
