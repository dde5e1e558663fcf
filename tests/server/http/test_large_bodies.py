"""Megabytes of messages, tools, token ids or numbers for one caller hold up nobody else: what grows with a body or an
answer is done off the event loop."""

import asyncio
import threading
from types import ModuleType
from typing import Any

import pytest

from inferflux.engine.text import TextBundle
from inferflux.server.http import chat_plan, input_guard
from inferflux.server.http.answer import INLINE_VALUES
from inferflux.server.http.formats.completion import CompletionFormat
from inferflux.server.http.formats.embedding import EmbeddingFormat
from inferflux.server.http.handlers import chat, tokens
from inferflux.server.http.requests import INLINE_BODY_BYTES
from inferflux.server.text_work import NUM_THREADS
from tests.support.fake_engine import EMBEDDING_SIZE
from tests.support.http_server import MODEL, running_server

# How long the work waits for the event loop to turn; only a test that fails waits so long.
TURN_S = 60.0
LARGE = {"model": MODEL, "messages": [{"role": "user", "content": "x" * INLINE_BODY_BYTES}]}
SCHEMA = {"name": "a", "description": "x" * INLINE_BODY_BYTES, "schema": {"type": "object"}}
SHAPED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "response_format": {"type": "json_schema", "json_schema": SCHEMA},
}
VECTORS = {"model": MODEL, "input": ["x"] * (INLINE_VALUES // EMBEDDING_SIZE + 1)}
SCORES = {"model": MODEL, "prompt": ["x"] * 64, "logprobs": 20, "max_tokens": 8, "ignore_eos": True}
ECHO = {"model": MODEL, "prompt": [1] * 224, "echo": True, "logprobs": 20, "max_tokens": 1, "stream": True}
IDS = {"model": MODEL, "tokens": [1] * INLINE_BODY_BYTES}


@pytest.mark.parametrize(
    ("module", "name", "path", "body"),
    [
        (chat, "template_messages", "/v1/chat/completions", LARGE),
        (chat, "texts_of_messages", "/v1/chat/completions", LARGE),
        (chat, "texts_of_tools", "/v1/chat/completions", LARGE),
        (chat, "plan_chat", "/v1/chat/completions", LARGE),
        (chat_plan.ChatPlan, "grammars", "/v1/chat/completions", SHAPED),
        (input_guard, "texts_in", "/v1/chat/completions", SHAPED),
        (tokens, "_prompt_of", "/detokenize", IDS),
        (EmbeddingFormat, "answer", "/v1/embeddings", VECTORS),
        (CompletionFormat, "answer", "/v1/completions", SCORES),
        (CompletionFormat, "events", "/v1/completions", ECHO),
    ],
)
async def test_the_event_loop_turns_meanwhile(
    module: ModuleType | type, name: str, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, turned = threading.Event(), threading.Event()
    work = getattr(module, name)
    waited: list[bool] = []

    def slow(*args: Any) -> Any:
        begun.set()
        waited.append(turned.wait(TURN_S))
        return work(*args)

    async def turn() -> None:
        while not begun.is_set():
            await asyncio.sleep(0)
        turned.set()

    monkeypatch.setattr(module, name, slow)
    async with running_server() as site:
        turning = asyncio.create_task(turn())
        async with site.session.post(site.url + path, json=body) as response:
            await response.read()
        turning.cancel()
    assert waited
    assert all(waited)


async def test_nobody_else_waits_behind_large_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few megabytes take a tokenizer seconds, and a few such requests took all threads there were for texts."""
    going_on, begun = threading.Event(), threading.Semaphore(0)
    render = TextBundle.chat_prompt

    def slow_when_large(self: TextBundle, messages: Any, **options: Any) -> Any:
        if messages == LARGE["messages"]:
            begun.release()
            assert going_on.wait(TURN_S), "others waited behind this"
        return render(self, messages, **options)

    monkeypatch.setattr(TextBundle, "chat_prompt", slow_when_large)
    async with running_server() as site:
        path = "/v1/chat/completions"
        large = [asyncio.create_task(site.post(path, LARGE)) for _ in range(2 * NUM_THREADS)]
        try:
            for _ in range(NUM_THREADS):
                assert await asyncio.to_thread(begun.acquire, timeout=TURN_S)
            small = {"messages": [{"role": "user", "content": "Hi"}]}
            async with asyncio.timeout(TURN_S / 2):
                assert (await site.post(path, small))[0] == 200
        finally:
            going_on.set()
        for status, _ in await asyncio.gather(*large):
            assert status == 400, "longer than the window"
