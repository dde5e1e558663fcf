"""What an area of `inferctl admin` consists of, and the confirmation before a change."""

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from inferflux.ctl.client import Client
from inferflux.errors import ConfigError, InferFluxError

Ask = Callable[[Client, argparse.Namespace], Awaitable[Any]]


class Action(NamedTuple):
    """help: one line for the listing. ask: asks the server and returns the answer. show: prints it for people."""

    help: str
    ask: Ask
    show: Callable[[Any], None]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None


class Area(NamedTuple):
    """default: the action that is meant when none is named; it takes no arguments of its own."""

    help: str
    default: str
    actions: Mapping[str, Action]


class DeclinedError(InferFluxError):
    """The user did not confirm."""


def read(path: str) -> Ask:
    """Returns an `Action.ask` that gets `path`."""
    return lambda client, _args: client.get(path)


def add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def add_if_match(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--if-match", metavar="TAG", help="change only what still has this tag (see `show`)")


def confirm(question: str, yes: bool) -> None:
    """Asks on the terminal unless `yes`. Raises DeclinedError for a no, ConfigError without a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("cannot ask for confirmation without a terminal; pass --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DeclinedError("nothing was changed")
