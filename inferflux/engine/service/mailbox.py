"""Mailbox: one request's outputs on their way from the socket to the coroutine that waits for them.

Outputs that arrive while the reader is busy are merged into one, so a slow reader costs memory for its tokens only, and
for at most MAX_UNREAD of them. Lives on one event loop; knows no socket.
"""

import asyncio
from typing import TypeVar

from inferflux.engine.interface import Output

T = TypeVar("T")

# Unread tokens and top alternatives allowed: a few megabytes. Only a reader that is blocked reaches it.
MAX_UNREAD = 16384


class Mailbox:
    """One producer (`put`, `fail`), one consumer (`get`)."""

    __slots__ = ("_error", "_pending", "_waiter")

    def __init__(self) -> None:
        self._pending: Output | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self._pending = output if self._pending is None else merge(self._pending, output)
        self._wake()

    @property
    def is_full(self) -> bool:
        """Whether so much is unread that the sequence should be stopped."""
        pending = self._pending
        if pending is None or len(pending.token_ids) < 2:
            return False
        num_top = max((len(entry.top) for entry in pending.logprobs or ()), default=0)
        return len(pending.token_ids) * (1 + num_top) > MAX_UNREAD

    def fail(self, error: Exception) -> None:
        """Ends the stream: `get` raises `error` once what was put before has been read."""
        self._error = error
        self._wake()

    async def get(self) -> Output:
        """Returns everything since the last call as one Output; waits while there is nothing."""
        while self._pending is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        output, self._pending = self._pending, None
        return output

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(first: Output, second: Output) -> Output:
    """Returns one Output with the contents of both, in order."""
    return Output(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=_join(first.logprobs, second.logprobs),
        prompt_logprobs=_join(first.prompt_logprobs, second.prompt_logprobs),
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        error=second.error,
        error_param=second.error_param,
        error_code=second.error_code,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        queue_s=first.queue_s if first.queue_s is not None else second.queue_s,
        vector=first.vector or second.vector,
    )


def _join(first: list[T] | None, second: list[T] | None) -> list[T] | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second
