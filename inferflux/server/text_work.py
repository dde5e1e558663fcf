"""TextWork: tokenising and template rendering without holding up the event loop.

Short texts are tokenised at once, since handing them to a thread costs more; long ones, and every chat template
(whose work the operator's template decides), go to a small pool of threads. Knows no HTTP.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from inferflux.engine.text import TextBundle

T = TypeVar("T")

NUM_THREADS = 2
# About half a millisecond of tokenising.
INLINE_CHARS = 512


class TextWork:
    """A pool of threads for text. `close` waits for what runs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Returns `function(*args)`, computed in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def encode(self, text: TextBundle, prompts: Sequence[str]) -> list[list[int]]:
        """Returns each prompt's token ids, with the model's special tokens. Raises RequestError."""
        if sum(map(len, prompts)) <= INLINE_CHARS:
            return _encode(text, prompts)
        return await self.run(_encode, text, prompts)

    async def encode_chat(self, text: TextBundle, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the token ids of the rendered conversation, ready for the answer. Raises RequestError."""
        return await self.run(text.encode_chat, messages)


def _encode(text: TextBundle, prompts: Sequence[str]) -> list[list[int]]:
    return text.tokenizer.encode_batch(prompts, add_special_tokens=True)
