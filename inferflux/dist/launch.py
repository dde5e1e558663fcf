"""From the `distributed` section to a ParallelContext. Knows the backends; knows no model."""

import torch

from inferflux.config.tree import DistributedConfig
from inferflux.dist.context import ParallelContext
from inferflux.errors import ConfigError


def launch(config: DistributedConfig, device: torch.device) -> ParallelContext:
    """Returns this process's context. Raises ConfigError for what cannot be launched."""
    if config.backend != "stub":
        raise ConfigError(f'distributed.backend: must be "stub", one process (got "{config.backend}")')
    if config.world_size != 1:
        raise ConfigError(f'distributed.world_size: must be 1 with backend "stub" (got {config.world_size})')
    return ParallelContext(rank=config.rank, size=config.world_size, device=device)
