"""What the health routes answer."""

from typing import Literal

import msgspec


class Probe(msgspec.Struct, frozen=True, omit_defaults=True):
    status: Literal["ok", "unavailable"]
    reason: str | None = None


class ModelHealth(msgspec.Struct, frozen=True):
    id: str
    state: str
    default: bool


class QueueHealth(msgspec.Struct, frozen=True):
    """running: requests that generate. waiting: requests and sequences not yet started, in server and engines."""

    running: int
    waiting: int


class Health(msgspec.Struct, frozen=True):
    status: Literal["ok", "degraded"]
    version: str
    uptime_s: float
    queue: QueueHealth
    models: list[ModelHealth]
