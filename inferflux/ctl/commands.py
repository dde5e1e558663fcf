"""What each subcommand does: ask the server, print the answer."""

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin import areas
from inferflux.ctl.arguments import given, read_source
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_embeddings, print_json, print_models, print_status, printable

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"
OPTIONS: Final = ("model", "max_tokens", "temperature")

Command = Callable[[Client, argparse.Namespace], Awaitable[None]]


async def status(client: Client, args: argparse.Namespace) -> None:
    """A server that is not ready is an answer, not a failure."""
    answer = {
        "url": client.url,
        "ready": await client.get("/readyz", accept=(200, 503)),
        "health": await client.get("/healthz"),
    }
    print_json(answer) if args.json else print_status(answer)


async def models(client: Client, args: argparse.Namespace) -> None:
    answer = await client.get("/v1/models")
    print_json(answer) if args.json else print_models(answer["data"])


async def completion(client: Client, args: argparse.Namespace) -> None:
    body = {"prompt": read_text(args.prompt), **given(args, OPTIONS)}
    await _generate(client, COMPLETIONS, body, args, lambda choice: choice["text"])


async def chat(client: Client, args: argparse.Namespace) -> None:
    body = {"messages": [{"role": "user", "content": read_text(args.message)}], **given(args, OPTIONS)}
    await _generate(client, CHAT, body, args, chat_text)


async def embed(client: Client, args: argparse.Namespace) -> None:
    body = {"input": [read_text(text) for text in args.text], **given(args, ("model", "dimensions"))}
    answer = await client.post(EMBEDDINGS, body)
    print_json(answer) if args.json else print_embeddings(answer["data"])


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {"status": status, "models": models, "completion": completion, "chat": chat, "embed": embed, "admin": areas.run}
)


def chat_text(choice: Mapping[str, Any]) -> str:
    """Returns the text of a chat choice, whole or chunk."""
    part = choice["message"] if "message" in choice else choice["delta"]
    return part.get("content") or ""


def read_text(argument: str) -> str:
    """Returns the argument, or standard input when it is a dash."""
    return read_source(argument) if argument == "-" else argument


def say(text: str) -> None:
    """Prints a piece of an answer at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


async def _generate(
    client: Client,
    path: str,
    body: dict[str, Any],
    args: argparse.Namespace,
    text_of: Callable[[Mapping[str, Any]], str],
) -> None:
    if not args.stream:
        answer = await client.post(path, body)
        print_json(answer) if args.json else say(text_of(answer["choices"][0]) + "\n")
        return
    async for event in client.stream(path, body):
        if args.json:
            print_json(event)
        else:
            say("".join(text_of(choice) for choice in event["choices"]))
    if not args.json:
        say("\n")
