"""`inferflux serve`: reads the configuration, sets logging up, hands over to `serve`."""

import argparse
import logging
from pathlib import Path
from typing import Final

from inferflux.config.commands import config_help, load_from_process
from inferflux.config.load import check_servable, located
from inferflux.errors import ConfigError
from inferflux.log import setup_logging
from inferflux.server.serve import run as run_server

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
    try:
        return run_server(loaded.config)
    except ConfigError as error:
        raise located(loaded, error) from error
