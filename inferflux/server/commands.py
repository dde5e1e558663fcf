"""`inferflux serve`: reads the configuration, sets logging up, starts what takes longest, hands over to `serve`."""

import argparse
import logging
from pathlib import Path
from typing import Final

from inferflux.config import Config
from inferflux.config.from_process import config_help, load_from_process
from inferflux.config.load import check_servable, located
from inferflux.engine.service.launch import EngineProcesses
from inferflux.errors import ConfigError
from inferflux.log import setup_logging

_FLAGS: Final = ("host", "port")

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help=config_help())
    parser.add_argument("--host", metavar="H", help="address to listen on (server.host)")
    parser.add_argument("--port", metavar="N", help="port to listen on, 0 for a free one (server.http_port)")


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop; returns the exit code. Raises ConfigError."""
    flags = {f"--{name}": value for name in _FLAGS if (value := getattr(args, name)) is not None}
    loaded = load_from_process(args.config, flags)
    check_servable(loaded)
    setup_logging(loaded.config.logging.level, loaded.config.logging.format)
    for warning in loaded.warnings:
        _logger.warning(warning)
    processes = EngineProcesses(loaded.config.logging)
    if _starts_with_a_process(loaded.config):
        processes.prepare()
    try:
        from inferflux.server.serve import run as run_server  # 0.7 s, while the engine's process imports torch

        return run_server(loaded.config, processes)
    except ConfigError as error:
        raise located(loaded, error) from error
    finally:
        processes.close()


def _starts_with_a_process(config: Config) -> bool:
    """Whether the first thing that the server will do is to start an engine's process."""
    has_model = bool(config.models) or config.registry.path is None
    return has_model and config.runtime.isolation == "process" and config.distributed.rank == 0
