"""`inferctl chat --interactive`: a conversation at the terminal, with the history the model needs to follow it."""

import asyncio
import contextlib
import importlib
import sys
from typing import Any, Final

from inferflux.ctl.client import Client, ServerError
from inferflux.ctl.commands import CHAT, chat_text, say

PROMPT: Final = "> "
HELP: Final = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class Conversation:
    """messages: what was said so far, as the API takes it. fields: the other fields of each request."""

    def __init__(self, client: Client, fields: dict[str, Any]) -> None:
        self.messages: list[dict[str, str]] = []
        self._client = client
        self._fields = fields

    async def say(self, text: str) -> None:
        """Sends one message and prints the answer as it comes.

        An answer that is cut short stays in the history as far as it came; a message that got none is forgotten.
        Raises ServerError.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            async for event in self._client.stream(CHAT, {**self._fields, "messages": asked}):
                for choice in event["choices"]:
                    piece = chat_text(choice)
                    answer += piece
                    say(piece)
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]
                say("\n")


def converse(client: Client, fields: dict[str, Any]) -> int:
    """Reads lines and answers them until the user leaves; returns the exit status."""
    with contextlib.suppress(ImportError):  # not every platform has it
        importlib.import_module("readline")  # gives input() arrow keys and a history of lines
    with asyncio.Runner() as runner:
        runner.run(client.__aenter__())
        try:
            _take_turns(runner, client, fields)
        finally:
            runner.run(client.__aexit__())
    return 0


def _take_turns(runner: asyncio.Runner, client: Client, fields: dict[str, Any]) -> None:
    conversation = Conversation(client, fields)
    print(HELP, file=sys.stderr)
    while (line := _read_line()) not in (None, "/exit"):
        match (line or "").strip():
            case "":
                continue
            case "/reset":
                conversation = Conversation(client, fields)
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


def _read_line() -> str | None:
    """Returns the next line, None at the end of input; Ctrl-C starts the line again."""
    try:
        return input(PROMPT).strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""
