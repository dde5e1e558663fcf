"""`inferctl chat --interactive`: a conversation at the terminal, with the history the model needs to follow it.

With --json it is a conversation between programs: a message per line in, the server's answers out.
"""

import argparse
import asyncio
import contextlib
import importlib
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

from inferflux.ctl.arguments import given
from inferflux.ctl.client import Client, ServerError
from inferflux.ctl.commands import CHAT, OPTIONS, chat_text, say
from inferflux.ctl.show import print_json

PROMPT: Final = "> "
HELP: Final = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class Conversation:
    """messages: what was said so far, as the API takes it. args: how to ask, and whether to print JSON."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self.messages: list[dict[str, str]] = []
        self._client = client
        self._args = args

    async def say(self, text: str) -> None:
        """Sends one message and prints the answer as it comes; as JSON whole, unless events were asked for.

        An answer that is cut short stays in the history as far as it came; a message that got none is forgotten.
        Raises ServerError.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            async for event in self._ask({**given(self._args, OPTIONS), "messages": asked}):
                piece = "".join(map(chat_text, event["choices"]))
                answer += piece
                print_json(event) if self._args.json else say(piece)
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]
                if not self._args.json:
                    say("\n")

    async def _ask(self, body: dict[str, Any]) -> AsyncIterator[Any]:
        if self._args.json and not self._args.stream:
            yield await self._client.post(CHAT, body)
            return
        async for event in self._client.stream(CHAT, body):
            yield event


def converse(client: Client, args: argparse.Namespace) -> int:
    """Reads lines and answers them until the user leaves; returns the exit status."""
    with contextlib.suppress(ImportError):  # not every platform has it
        importlib.import_module("readline")  # gives input() arrow keys and a history of lines
    with asyncio.Runner() as runner:
        runner.run(client.__aenter__())
        try:
            _take_turns(runner, client, args)
        finally:
            runner.run(client.__aexit__())
    return 0


def _take_turns(runner: asyncio.Runner, client: Client, args: argparse.Namespace) -> None:
    conversation = Conversation(client, args)
    print(HELP, file=sys.stderr)
    while (line := _read_line("" if args.json else PROMPT)) not in (None, "/exit"):
        match (line or "").strip():
            case "":
                continue
            case "/reset":
                conversation = Conversation(client, args)
            case "/help":
                print(HELP, file=sys.stderr)
            case text:
                _answer(runner, conversation, text)


def _answer(runner: asyncio.Runner, conversation: Conversation, text: str) -> None:
    try:
        runner.run(conversation.say(text))
    except KeyboardInterrupt:
        print("(stopped)", file=sys.stderr)
    except ServerError as error:
        print(f"inferctl: {error}", file=sys.stderr)


def _read_line(prompt: str) -> str | None:
    """Returns the next line, None at the end of input; Ctrl-C starts the line again."""
    try:
        return input(prompt).strip()
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
