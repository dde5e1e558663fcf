"""ModelEvents: what happened to models: the latest events for operators, a log line each, and the metrics.

Knows no engines.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

logger = logging.getLogger(__name__)

MAX_EVENTS: Final = 100

OnModelEvent = Callable[[str, str, float | None], None]
"""Called with model id, event and the seconds a load took."""


class ModelEvent(msgspec.Struct, frozen=True):
    """time: Unix time in seconds. model: empty for an event of the registry. detail: the reason, where there is one."""

    time: float
    event: str
    model: str
    detail: str | None = None


class ModelEvents:
    """The last MAX_EVENTS events, oldest first."""

    def __init__(self, on_event: OnModelEvent) -> None:
        self._events: deque[ModelEvent] = deque(maxlen=MAX_EVENTS)
        self._on_event = on_event

    @property
    def latest(self) -> list[ModelEvent]:
        return list(self._events)

    def add(self, event: str, model_id: str = "", *, detail: str | None = None, load_s: float | None = None) -> None:
        self._events.append(ModelEvent(round(time.time(), 3), event, model_id, detail))
        self._on_event(model_id, event, load_s)
        subject = f"model {model_id}" if model_id else "registry"
        level = logging.ERROR if event in ("failed", "registry_refused") else logging.INFO
        logger.log(level, "%s: %s%s", subject, event, f": {detail}" if detail else "")
