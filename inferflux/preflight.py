"""Preflight: finds what would keep `inferflux serve` from starting with a configuration, without starting anything.

Looks at the files that it names and at this machine's devices; reads no weights, opens no port, writes nothing. What
depends on free memory, on the policy store's content and on other ranks is left to the start itself.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from inferflux.config import Config
from inferflux.engine.runner.build import check_settings
from inferflux.engine.text import load_text
from inferflux.errors import ConfigError
from inferflux.server.model_source import find_sources, require_adapters
from inferflux.server.policy.opening import gate_settings
from inferflux.server.policy.seed import seed_document
from inferflux.server.ranks import check_ranks
from inferflux.server.tls import server_context


def preflight(config: Config) -> list[str]:
    """Returns notes on what the server would do differently from what was asked for.

    Raises ConfigError, beginning with the key at fault, for what it would refuse; ModelLoadError for a model's folder
    that is not sound.
    """
    server_context(config.server.tls)
    _check_folders(config)
    gate_settings(config, seed_document(config, time.time()))
    sources = find_sources(config)
    require_adapters(config)
    check_ranks(config, sources)
    for source in sources:
        assert source.model.path is not None, "find_sources gives every model a folder"
        load_text(Path(source.model.path), source.model.chat_template)
        check_settings(source.model, source.adapters, config.runtime, config.distributed)
    return [
        f"models: {source.model.id}: {source.fallback}: the demo model would answer in its place"
        for source in sources
        if source.fallback is not None
    ]


def _check_folders(config: Config) -> None:
    for key, path in _written(config):
        folder = Path(path).parent
        if not folder.is_dir():
            raise ConfigError(f"{key}: {path}: must be in a folder (got {folder}, which is none)")


def _written(config: Config) -> Iterator[tuple[str, str]]:
    """The files that the server makes if need be, and does not start without."""
    if config.policy.store is not None:
        yield "policy.store", config.policy.store
    if config.logging.audit_log is not None:
        yield "logging.audit_log", config.logging.audit_log
