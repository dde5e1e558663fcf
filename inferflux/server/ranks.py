"""The server among several ranks: what every rank checks before it starts, and how a rank other than 0 serves.

Rank 0 is the server; the others have no HTTP, no keys and no policy: they compute their share of the model.
"""

from pathlib import Path
from typing import Final

from inferflux.config import Config
from inferflux.engine.models.partition import check_partition
from inferflux.engine.models.spec import read_spec
from inferflux.engine.service.launch import follow_first_rank
from inferflux.server.model_source import ModelSource, find_sources

# Rank 0 drains for at most `server.drain_timeout_s`, and then needs a moment to close.
CLOSING_S: Final = 5.0


def check_ranks(config: Config, sources: list[ModelSource]) -> None:
    """Raises ConfigError, with the equation that failed, unless the ranks can share the model; ModelLoadError when the
    model's folder is not sound."""
    if config.distributed.world_size > 1:
        for source in sources:
            assert source.model.path is not None, "find_sources gives every model a folder"
            check_partition(read_spec(Path(source.model.path)), config.distributed.world_size)


def follow(config: Config) -> int:
    """Computes this rank's share until rank 0 lets it go; returns the exit status.

    Raises ConfigError and ModelLoadError as rank 0's server does.
    """
    sources = find_sources(config)
    check_ranks(config, sources)
    grace_s = config.server.drain_timeout_s + CLOSING_S
    return follow_first_rank(sources[0].model, config.runtime, config.distributed, sources[0].adapters, grace_s)
