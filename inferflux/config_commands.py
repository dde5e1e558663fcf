"""`inferflux config check FILE` and `inferflux config show`."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from inferflux.config.from_process import config_help, load_from_process
from inferflux.config.load import check_servable, load_config, located
from inferflux.config.show import as_json, as_text
from inferflux.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show")
    check = actions.add_parser("check", help="check a file, without the environment; exit 2 if it is invalid")
    check.add_argument("file", type=Path, metavar="FILE")
    check.add_argument(
        "--preflight",
        action="store_true",
        help="check also, with the environment, what it names on this machine: models, kernels, certificates, devices",
    )
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
    _print_notes(_preflight(args.file) if args.preflight else _check_file(args.file))
    print(f"{args.file}: ok")
    return 0


def _check_file(path: Path) -> Iterator[str]:
    """Checks what can be told from the file alone, on any machine; yields notes."""
    loaded = load_config(path, {}, {})
    yield from loaded.warnings
    try:
        check_servable(loaded)
    except ConfigError as error:
        yield f"to serve this, the environment must change it: {error}"


def _preflight(path: Path) -> Iterator[str]:
    """Checks whether a server would start with the file here; yields notes."""
    from inferflux.preflight import preflight  # 2 s: it knows the kernels, and so torch

    loaded = load_from_process(path, {})
    yield from loaded.warnings
    check_servable(loaded)
    try:
        yield from preflight(loaded.config)
    except ConfigError as error:
        found = located(loaded, error)
        raise (found if found is not error else ConfigError(f"{path}: {error}")) from error


def _show(args: argparse.Namespace) -> int:
    loaded = load_from_process(args.config, {})
    _print_notes(loaded.warnings)
    print(as_json(loaded) if args.json else as_text(loaded))
    return 0


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
