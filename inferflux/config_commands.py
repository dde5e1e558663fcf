"""`inferflux config check FILE` and `inferflux config show`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from inferflux.config.from_process import config_help, load_from_process
from inferflux.config.load import LoadedConfig, check_servable, load_config, located
from inferflux.config.show import as_json, as_text
from inferflux.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show")
    check = actions.add_parser(
        "check", help="check a file and what it names, without the environment; exit 2 if a server could not start"
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.add_argument("--syntax-only", action="store_true", help="look at no other file, and at no device")
    check.set_defaults(run=_check)
    show = actions.add_parser("show", help="print every effective value and where it comes from, secrets masked")
    show.add_argument("--config", type=Path, metavar="FILE", help=config_help())
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError when the configuration cannot be used, ModelLoadError when a model's folder cannot."""
    code: int = args.run(args)
    return code


def _check(args: argparse.Namespace) -> int:
    loaded = load_config(args.file, {}, {})
    notes = list(loaded.warnings)
    try:
        check_servable(loaded)
    except ConfigError as error:
        notes.append(f"to serve this, the environment must change it: {error}")
    if not args.syntax_only:
        notes += _preflight(loaded)
    _print_notes(notes)
    print(f"{args.file}: ok")
    return 0


def _preflight(loaded: LoadedConfig) -> Iterable[str]:
    from inferflux.preflight import preflight  # 2 s: it knows the kernels, and so torch

    try:
        return preflight(loaded.config)
    except ConfigError as error:
        found = located(loaded, error)
        raise (found if found is not error else ConfigError(f"{loaded.path}: {error}")) from error


def _show(args: argparse.Namespace) -> int:
    loaded = load_from_process(args.config, {})
    _print_notes(loaded.warnings)
    print(as_json(loaded) if args.json else as_text(loaded))
    return 0


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
