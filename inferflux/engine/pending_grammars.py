"""PendingGrammars: requests whose grammar is still being compiled, before the scheduler knows them.

The engine goes on stepping others meanwhile. Knows futures and requests; no queue, no pages and no tensor.
"""

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Final

from inferflux.engine.request import Request

# How long a step that has nothing else to do waits for a grammar: messages must not wait longer.
PATIENCE_S: Final = 0.005


class PendingGrammars:
    """In order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Request, Future[Any]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request, prepared: Future[Any]) -> None:
        self._waiting[request.id] = request, prepared

    def remove(self, request_ids: Iterable[int]) -> None:
        """Forgets these requests and cancels compilations that have not started; unknown ids are ignored."""
        for request_id in request_ids:
            if request_id in self._waiting:
                _, prepared = self._waiting.pop(request_id)
                prepared.cancel()

    def take_ready(self, *, idle: bool) -> list[tuple[Request, BaseException | None]]:
        """Returns the requests whose compilation has ended, each with its error or None. idle: wait a moment for
        one."""
        if idle:
            wait([prepared for _, prepared in self._waiting.values()], PATIENCE_S, FIRST_COMPLETED)
        done = [(request, prepared) for request, prepared in self._waiting.values() if prepared.done()]
        self.remove(request.id for request, _ in done)
        return [(request, prepared.exception()) for request, prepared in done]
