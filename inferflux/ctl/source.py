"""Texts that a command is given by name: a file, or `-` for standard input."""

import sys
from pathlib import Path

from inferflux.errors import ConfigError


def read_source(source: str) -> str:
    """Returns the text. Raises ConfigError when it cannot be read."""
    try:
        return (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None
