"""What a command was given: texts by name (a file, or `-` for standard input), and the options that were set."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inferflux.errors import ConfigError


def read_source(source: str) -> str:
    """Returns the text. Raises ConfigError when it cannot be read."""
    try:
        return (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Returns those of the options that were set, by name; the server has defaults for the others."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
