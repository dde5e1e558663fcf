"""`inferflux config check FILE` and `inferflux config show`."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from inferflux.config.load import LoadedConfig, check_servable, load_config
from inferflux.config.show import as_json, as_text
from inferflux.errors import ConfigError

DEFAULT_FILE: Final = Path("config/server.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show")
    check = actions.add_parser("check", help="check a file, without the environment; exit 2 if it is invalid")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=_check)
    show = actions.add_parser("show", help="print every effective value and where it comes from, secrets masked")
    show.add_argument("--config", type=Path, metavar="FILE", help=config_help())
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError when the configuration cannot be used."""
    code: int = args.run(args)
    return code


def config_help() -> str:
    return f"YAML file (default: {DEFAULT_FILE} where it exists)"


def load_from_process(path: Path | None, flags: Mapping[str, str | int]) -> LoadedConfig:
    """The configuration of this process: the file named, or the default one where it exists, under this environment."""
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    return load_config(path, os.environ, flags)


def _check(args: argparse.Namespace) -> int:
    loaded = load_config(args.file, {}, {})
    notes = list(loaded.warnings)
    try:
        check_servable(loaded)
    except ConfigError as error:
        notes.append(f"to serve this, the environment must change it: {error}")
    _print_notes(notes)
    print(f"{args.file}: ok")
    return 0


def _show(args: argparse.Namespace) -> int:
    loaded = load_from_process(args.config, {})
    _print_notes(loaded.warnings)
    print(as_json(loaded) if args.json else as_text(loaded))
    return 0


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
