"""`inferctl`: the command line, and what its errors come to."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from inferflux import __version__
from inferflux.command_line import EXIT_FAILED, EXIT_USAGE, Parser, give_up_output
from inferflux.config.process_env import API_KEY, URL, read_client_environment
from inferflux.config.urls import is_http_url
from inferflux.ctl.admin.areas import add_areas
from inferflux.ctl.client import Client
from inferflux.ctl.commands import COMMANDS
from inferflux.ctl.interactive import converse
from inferflux.errors import ConfigError, InferFluxError
from inferflux.log import mask_secrets


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Lets KeyboardInterrupt through."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    environment = read_client_environment()
    url = args.url or environment.url
    api_key = args.api_key or environment.api_key
    if not is_http_url(url):
        parser.error(f"the server's address must be an http or https URL, without a user (got {mask_secrets(url)!r})")
    if api_key is not None and not api_key.isprintable():
        parser.error("the API key must be one line of printable characters")
    client = Client(url, api_key)
    try:
        if getattr(args, "interactive", False):
            return converse(client, args)
        asyncio.run(_run(client, args))
        sys.stdout.flush()
    except InferFluxError as error:
        print(f"inferctl: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except OSError as error:
        return give_up_output("inferctl", error)
    return 0


async def _run(client: Client, args: argparse.Namespace) -> None:
    async with client:
        await COMMANDS[args.command](client, args)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.command != "chat":
        return
    if args.interactive == (args.message is not None):
        parser.error("chat: give either a message or --interactive")


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="inferctl", description="Talk to an InferFlux server.", parents=[_common_options()])
    parser.add_argument("--version", action="version", version=f"inferctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Without defaults, so that what was said before a command's name holds after it.
    common = _common_options(argument_default=argparse.SUPPRESS)
    generate = _generate_options()
    commands.add_parser("status", parents=[common], help="is the server ready, and what does it do")
    commands.add_parser("models", parents=[common], help="the models it serves")
    completion = commands.add_parser("completion", parents=[common, generate], help="continue a text")
    completion.add_argument("prompt", metavar="PROMPT", help="the text; - reads standard input")
    chat = commands.add_parser("chat", parents=[common, generate], help="ask something")
    chat.add_argument("message", metavar="MESSAGE", nargs="?", help="the question; - reads standard input")
    chat.add_argument("--interactive", action="store_true", help="a conversation at the terminal")
    embed = commands.add_parser("embed", parents=[common], help="texts to vectors, one a line")
    embed.add_argument("text", metavar="TEXT", nargs="+", help="a text; - reads standard input")
    embed.add_argument("--model", metavar="ID", help="default: the server's default model")
    embed.add_argument("--dimensions", type=int, metavar="N", help="only the first N numbers of each vector")
    admin = commands.add_parser("admin", parents=[common], help="run the server; needs a key with the scope admin")
    add_areas(admin, common)
    return parser


def _common_options(**settings: Any) -> Parser:
    common = Parser(add_help=False, **settings)
    common.add_argument("--url", help=f"the server's address (default: {URL}, else http://127.0.0.1:8080)")
    common.add_argument("--api-key", metavar="KEY", help=f"better given in {API_KEY}: others can see command lines")
    common.add_argument("--json", action="store_true", help="the server's JSON, one line per answer or event")
    return common


def _generate_options() -> Parser:
    generate = Parser(add_help=False)
    generate.add_argument("--model", metavar="ID", help="default: the server's default model")
    generate.add_argument("--max-tokens", type=int, metavar="N", help="maximum number of tokens to generate")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    generate.add_argument("--stream", action="store_true", help="print tokens as they come")
    return generate
