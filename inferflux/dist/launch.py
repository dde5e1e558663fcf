"""From the `distributed` section to a ParallelContext: ranks connect and leave. Knows the backends, but no model."""

import logging
import os
import sys
from datetime import timedelta
from typing import Final

import torch
import torch.distributed
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from inferflux.config.tree import DistributedConfig
from inferflux.dist.context import ParallelContext
from inferflux.dist.faults import first_line
from inferflux.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

# Pods and hosts start minutes apart, and load at their own speed.
START_TIMEOUT_S: Final = 600.0
# A collective times out earlier than `distributed.timeout_s`, which leaves time to report it and exit.
COLLECTIVE_SHARE: Final = 0.75
_ATTEMPT: Final = "TORCHELASTIC_RESTART_COUNT"
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


def launch(
    config: DistributedConfig, device: torch.device, start_timeout_s: float = START_TIMEOUT_S
) -> ParallelContext:
    """Returns this process's context once all ranks have connected.

    Raises ConfigError for an impossible configuration, EngineDeadError if the ranks do not find each other.
    """
    backend = backend_of(config, device)
    if backend == "stub":
        return ParallelContext(rank=config.rank, size=config.world_size, device=device)
    if config.master_addr in _LOOPBACK and sys.platform == "linux":
        # Ranks on one host need not be reachable from outside: gloo does not authenticate its connections.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = collective_timeout(config)
    where = f"{config.master_addr}:{config.master_port}"
    logger.info("rank %d of %d connects to the others at %s", config.rank, config.world_size, where)
    try:
        # The rendezvous waits longer than any collective, so that a slow host is not taken for a dead one.
        store, rank, size = next(rendezvous(_url(config), timeout=timedelta(seconds=start_timeout_s)))
        # torchrun's store outlives a restart, and still has the dead group's addresses.
        store = PrefixStore(f"attempt {os.environ.get(_ATTEMPT, 0)}", store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=_bound(backend, device)
        )
        control = torch.distributed.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        lost = f"rank {config.rank} of {config.world_size} found no group at {where}"
        raise EngineDeadError(f"{lost}: {first_line(error)}") from error
    return ParallelContext(rank, size, device, torch.distributed.group.WORLD, control)


def leave(context: ParallelContext) -> None:
    """Leaves the group; the context must not be used afterwards."""
    if context.group is not None:
        if context.device.type == "cuda":
            # A step with collectives may still be running.
            torch.cuda.synchronize(context.device)
        torch.distributed.destroy_process_group()


def backend_of(config: DistributedConfig, device: torch.device) -> str:
    """Returns the backend to use. Raises ConfigError if it does not fit the device or the number of ranks."""
    if config.backend is None:
        return "stub" if config.world_size == 1 else "nccl" if device.type == "cuda" else "gloo"
    if config.backend == "stub" and config.world_size != 1:
        raise ConfigError(f'distributed.world_size: must be 1 with backend "stub" (got {config.world_size})')
    if config.backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            "distributed.backend: nccl needs a model on CUDA devices, and this one is on the CPU; use gloo"
        )
    if config.backend == "gloo" and device.type == "cuda":
        raise ConfigError("distributed.backend: gloo is for models on the CPU, and this one is on CUDA; use nccl")
    return config.backend


def collective_timeout(config: DistributedConfig) -> timedelta:
    return timedelta(seconds=config.timeout_s * COLLECTIVE_SHARE)


def _bound(backend: str, device: torch.device) -> torch.device | None:
    """NCCL needs to know its device early; gloo has none."""
    return device if backend == "nccl" else None


def _url(config: DistributedConfig) -> str:
    host = f"[{config.master_addr}]" if ":" in config.master_addr else config.master_addr
    return f"tcp://{host}:{config.master_port}?rank={config.rank}&world_size={config.world_size}"
