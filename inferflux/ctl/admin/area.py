"""What an area of `inferctl admin` is made of, and the question before what cannot be undone."""

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from inferflux.ctl.client import Client
from inferflux.errors import ConfigError, InferFluxError

Run = Callable[[Client, argparse.Namespace], Awaitable[None]]


class Action(NamedTuple):
    """help: one line for the listing. run: asks the server and prints the answer."""

    help: str
    run: Run
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None


class Area(NamedTuple):
    """default: the action that is meant when none is named; it takes no arguments of its own."""

    help: str
    default: str
    actions: Mapping[str, Action]


class DeclinedError(InferFluxError):
    """The user did not confirm."""


def add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="do not ask")


def add_if_match(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--if-match", metavar="TAG", help="only if `show` would still print this tag")


def confirm(question: str, yes: bool) -> None:
    """Asks on the terminal unless `yes`. Raises DeclinedError for a no, ConfigError where there is nobody
    to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("cannot ask for confirmation without a terminal; pass --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DeclinedError("nothing was changed")
