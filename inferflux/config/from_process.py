"""The configuration of this process: its file, its environment, its flags."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from inferflux.config.load import LoadedConfig, load_config

DEFAULT_FILE: Final = Path("config/server.yaml")


def config_help() -> str:
    return f"YAML file (default: {DEFAULT_FILE} where it exists)"


def load_from_process(path: Path | None, flags: Mapping[str, str | int]) -> LoadedConfig:
    """The configuration of this process: the file named, or the default one where it exists, under this environment."""
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    return load_config(path, os.environ, flags)
