"""ModelRegistry: follows a file that lists the models to serve, through bad edits and half-written ones.

Content is applied once two polls in a row find the same, or at once when the API asks for it. What cannot be applied is
refused whole, logged and tried again; the running models stay. Knows neither file nor engine: reading and applying are
arguments, as is the clock.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

import msgspec

from inferflux.config import ModelConfig
from inferflux.config.registry_file import parse_registry
from inferflux.errors import ConfigError, InferFluxError
from inferflux.server.models.events import ModelEvents

logger = logging.getLogger(__name__)

# A changed file is looked at again so soon, to see whether its writer has finished.
SETTLE_S: Final = 0.5
LONGEST_RETRY_PAUSE_S: Final = 60.0

Read = Callable[[], str]
"""Returns the content. Raises ConfigError when there is none to be had. Blocks."""
Follow = Callable[[Sequence[ModelConfig]], Awaitable[None]]
"""Puts the models in force. Raises InferFluxError when that cannot be, and then nothing has changed."""


class RegistryStatus(msgspec.Struct, frozen=True):
    """state: ok (what the file says is served), loading (a change is under way), error (the last one was refused).
    error: why."""

    path: str
    state: Literal["ok", "loading", "error"] = "loading"
    error: str | None = None


class ModelRegistry:
    """path: for messages only. interval_s: between two looks. taken: ids that are adapters'."""

    def __init__(
        self,
        path: str,
        read: Read,
        events: ModelEvents,
        *,
        interval_s: float,
        clock: Callable[[], float],
        taken: frozenset[str] = frozenset(),
    ) -> None:
        self.status = RegistryStatus(path)
        self._read = read
        self._events = events
        self._interval_s = interval_s
        self._clock = clock
        self._taken = taken
        self._asked = asyncio.Event()
        self._seen: str | None = None
        self._tried: str | None = None
        self._attempt: asyncio.Task[None] | None = None
        self._pause_s = interval_s
        self._next_try = 0.0

    def first(self) -> Sequence[ModelConfig]:
        """Returns what to serve from the start: the file's models, or none when it is unfit. Blocks."""
        try:
            self._seen = self._read()
            models = parse_registry(self._seen, self._taken)
        except ConfigError as error:
            self._refuse(error)
            return ()
        self._tried = self._seen
        self._accept(models)
        return models

    def look_soon(self) -> None:
        """Asks for a look now, whether or not the file has just changed or failed."""
        self._asked.set()

    async def run(self, follow: Follow) -> None:
        """Follows the file until it is cancelled."""
        pause_s = self._interval_s
        try:
            while True:
                asked = await self._wait(pause_s)
                try:
                    settled = await self.look(follow, asked=asked)
                except Exception as error:  # the models that run must not end with the one who looks after a file
                    logger.exception("looking at %s failed", self.status.path)
                    self._refuse(error)
                    settled = True
                pause_s = self._interval_s if settled else min(SETTLE_S, self._interval_s)
        finally:
            await self._stop_attempt()

    async def look(self, follow: Follow, *, asked: bool = False) -> bool:
        """Looks once and begins what is due; returns whether the file has settled."""
        try:
            text = await asyncio.to_thread(self._read)
        except ConfigError as error:
            self._seen = self._tried = None
            await self._stop_attempt()
            self._refuse(error)
            return True
        settled = asked or text == self._seen
        self._seen = text
        if settled and self._is_due(text, asked):
            await self._stop_attempt()
            if text != self._tried:  # an earlier content's fault says nothing of this one
                self.status = RegistryStatus(self.status.path)
            self._tried = text
            self._attempt = asyncio.create_task(self._try(text, follow))
        return settled

    def _is_due(self, text: str, asked: bool) -> bool:
        """What is in force or under way is not done again; what was refused is, after a while."""
        if text != self._tried:
            self._pause_s, self._next_try = self._interval_s, 0.0
            return True
        under_way = self._attempt is not None and not self._attempt.done()
        return self.status.state == "error" and not under_way and (asked or self._clock() >= self._next_try)

    async def _try(self, text: str, follow: Follow) -> None:
        try:
            models = await asyncio.to_thread(parse_registry, text, self._taken)
            await follow(models)
        except InferFluxError as error:
            self._refuse(error)
        except Exception as error:
            logger.exception("following %s failed", self.status.path)
            self._refuse(error)
        else:
            self._accept(models)

    def _accept(self, models: Sequence[ModelConfig]) -> None:
        self.status = RegistryStatus(self.status.path, "ok")
        self._events.add("registry_applied", detail=", ".join(model.id for model in models) or "no models")

    def _refuse(self, error: Exception) -> None:
        self._next_try = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_PAUSE_S)
        words = f"{self.status.path}: {error or type(error).__name__}"
        if words != self.status.error:
            self.status = RegistryStatus(self.status.path, "error", words)
            self._events.add("registry_refused", detail=f"{words}; the running models stay")

    async def _wait(self, seconds: float) -> bool:
        """Returns at once, and true, when a look has been asked for."""
        try:
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    async def _stop_attempt(self) -> None:
        """A change under way is given up for one that comes after it."""
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)
            self._attempt = None
