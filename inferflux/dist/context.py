"""ParallelContext: which rank this is, which part of a weight is its own, and how ranks exchange tensors.

Every collective is a no-op at size 1, so that callers need not ask. How ranks find each other is `launch`'s work.
"""

from dataclasses import dataclass

import torch
import torch.distributed

from inferflux.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """rank: 0 <= rank < size. device: where this rank computes."""

    rank: int
    size: int
    device: torch.device

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"distributed: 0 <= rank < world_size failed: rank {self.rank}, world_size {self.size}")

    def split(self, length: int, name: str) -> slice:
        """Returns this rank's part of a dimension. Raises ConfigError when ranks cannot share it evenly."""
        if length % self.size:
            raise ConfigError(
                f"{name} % distributed.world_size == 0 failed: {length} % {self.size} = {length % self.size}"
            )
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over ranks; may overwrite `tensor`."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Returns all ranks' tensors (of one shape) joined along `dim`, in the order of ranks."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts, dim=dim)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Returns rank `source`'s tensor on every rank; overwrites `tensor` on the others."""
        if self.size > 1:
            torch.distributed.broadcast(tensor, source)
        return tensor
