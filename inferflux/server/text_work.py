"""TextWork: tokenising and template rendering without holding up the event loop.

Short texts are tokenised at once, since handing them to a thread costs more; long ones, and every chat template
(whose work the operator's template decides), go to a small pool of threads; which of several, the caller decides.
Knows no HTTP.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from inferflux.engine.text import ChatPrompt, TextBundle
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar
from inferflux.server.grammar_check import GrammarCheck

T = TypeVar("T")

NUM_THREADS = 2
# About half a millisecond of tokenising.
INLINE_CHARS = 512
# The library bounds its own work; this is for a machine that has no time for it.
GRAMMAR_TIMEOUT_S: Final = 10.0


class TextWork:
    """A pool of threads for text. `close` waits for what runs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Returns `function(*args)`, computed in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def encode(
        self, text: TextBundle, prompts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Returns each prompt's token ids, by default with the model's special tokens. Raises RequestError."""
        if sum(map(len, prompts)) <= INLINE_CHARS:
            return _encode(text, prompts, add_special_tokens)
        return await self.run(_encode, text, prompts, add_special_tokens)

    async def chat_prompt(
        self,
        text: TextBundle,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Returns the rendered conversation, ready for the answer. Raises RequestError."""
        return await self.run(lambda: text.chat_prompt(messages, tools=tools, variables=variables))

    async def check_grammar(self, check: GrammarCheck, grammar: Grammar, param: str) -> None:
        """Raises RequestError naming `param` when the model's engine could not use the grammar."""
        try:
            async with asyncio.timeout(GRAMMAR_TIMEOUT_S):
                await self.run(check.check, grammar)
        except TimeoutError:
            raise RequestError(f"{param}: takes too long to compile", param=param) from None
        except RequestError as error:
            raise RequestError(f"{param}: {error}", param=param) from None


def _encode(text: TextBundle, prompts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    return text.tokenizer.encode_batch(prompts, add_special_tokens=add_special_tokens)
