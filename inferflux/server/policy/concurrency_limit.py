"""ConcurrencyLimit: limits how many questions a service gets at once, and how long each answer and each wait may take.

A burst of requests must not count against a service that answers each in time: a question waits for its turn as long as
the service answers others. When it has answered none for as long as one answer may take, the waiting ones fail too. Nor
must a busy event loop count: time is measured in ticks, at most one per iteration of the loop. Knows no service.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

# Iterations of the loop before an answer is late; receiving one that has arrived takes a few.
TICKS: Final = 10


class ConcurrencyLimit:
    """most: questions at once; the others follow in order of arrival. patience_s: for one answer, from the start of its
    turn. For one event loop."""

    def __init__(self, most: int, patience_s: float) -> None:
        self.patience_s = patience_s
        self._free = most
        self._tick_s = patience_s / TICKS
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._watch: asyncio.Task[None] | None = None
        self._silent_ticks = 0

    async def ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Returns what the question returns, once it has had its turn. Raises what it raises, and TimeoutError."""
        if self._free:
            self._free -= 1
        else:
            await self._wait()
        try:
            return await self._answer(asyncio.create_task(question()))
        finally:
            self._pass_on()

    async def _answer(self, task: asyncio.Task[T]) -> T:
        try:
            for _ in range(TICKS):
                await asyncio.wait((task,), timeout=self._tick_s)
                if task.done():
                    self._silent_ticks = 0
                    return task.result()
            raise TimeoutError
        finally:
            task.cancel()

    async def _wait(self) -> None:
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            self._silent_ticks = 0
            self._watch = asyncio.create_task(self._fail_when_silent())
        self._waiting.append(turn)
        try:
            has_turn = await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled() and turn.result():
                self._pass_on()
            raise
        if not has_turn:
            raise TimeoutError

    async def _fail_when_silent(self) -> None:
        """Fails all waiting questions when the service has been silent for too long; ends when none waits."""
        while self._waiting:
            await asyncio.sleep(self._tick_s)
            self._silent_ticks += 1
            while self._silent_ticks > TICKS and self._call(has_turn=False):
                pass

    def _pass_on(self) -> None:
        if not self._call(has_turn=True):
            self._free += 1

    def _call(self, *, has_turn: bool) -> bool:
        """Wakes the first waiting question, with or without a turn; returns whether there was one."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # has left just now
                turn.set_result(has_turn)
                return True
        return False
