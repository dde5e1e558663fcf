"""The `inferflux` command: finds the subcommand, runs it, turns errors into exit codes.

Each subcommand is a module with `add_arguments(parser)` and `run(args) -> exit code`, imported only when it is asked
for: `inferflux config show` never waits for torch, and `inferflux kernels` never for the server.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Final, NamedTuple

from inferflux import __version__
from inferflux.command_line import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Parser, give_up_output, open_streams
from inferflux.errors import ConfigError, InferFluxError, RequestError, did_you_mean


class Command(NamedTuple):
    """help: one line for the listing. module: where `add_arguments` and `run` are."""

    help: str
    module: str


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "serve": Command("start the HTTP server", "inferflux.server.commands"),
        "config": Command("check a configuration file, show the effective configuration", "inferflux.config_commands"),
        "policy": Command("restore the policy store, change its passphrase", "inferflux.server.policy.commands"),
        "audit": Command("verify that an audit log has not been changed", "inferflux.server.audit.commands"),
        "kernels": Command("list, check, benchmark, tune and build the compute kernels", "inferflux.kernels.commands"),
        "bench": Command("measure the runtime", "inferflux.engine.bench"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 ok, 1 failed, 2 usage or configuration error, 130 interrupted."""
    interrupts: list[int] = []
    open_streams()
    try:
        with _noted(interrupts):
            code = _dispatch(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except (ConfigError, RequestError) as error:
        return _fail(error, EXIT_USAGE)
    except InferFluxError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if interrupts:
            return EXIT_INTERRUPTED
        if isinstance(error, OSError):
            return give_up_output("inferflux", error)
        raise


@contextlib.contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt as ever and is noted, for a library's import that it hits may fail with an error
    of its own in its place (torch imports numpy and catches what comes)."""

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _dispatch(argv: list[str]) -> int:
    name = _command_name(argv)
    command = COMMANDS[name]
    with _stoppable() if name == "serve" else contextlib.nullcontext():
        with _leaving_at_once():
            module = importlib.import_module(command.module)
        parser = Parser(prog=f"inferflux {name}", description=command.help)
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(argv[1:]))
        return code


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """While libraries are imported Ctrl-C ends the process: numpy, which torch imports, swallows the exception, and
    torch's own start aborts on it."""
    before = signal.getsignal(signal.SIGINT)
    if before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Until the server listens to signals itself, it has nothing to finish: it leaves at once, with the exit code that
    it would have had later."""
    codes: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: EXIT_INTERRUPTED}
    before = {number: signal.signal(number, lambda caught, _frame: os._exit(codes[caught])) for number in codes}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command_name(argv: list[str]) -> str:
    listing = "\n".join(f"  {name:10}{command.help}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="inferflux",
        usage="inferflux COMMAND ...",
        description="LLM inference server and research engine.",
        epilog=f"commands:\n{listing}\n\nEach command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"inferflux {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    name: str = parser.parse_args(argv[:1]).command
    if name not in COMMANDS:
        parser.error(f'no command "{name}"{did_you_mean(name, COMMANDS) or "; commands: " + ", ".join(COMMANDS)}')
    return name


def _fail(error: InferFluxError, code: int) -> int:
    print(f"inferflux: {error}" if code == EXIT_FAILED else str(error), file=sys.stderr)
    return code
