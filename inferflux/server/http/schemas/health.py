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


class Health(msgspec.Struct, frozen=True):
    """running: requests that generate. queue_depth: requests and sequences that wait, in server and engines."""

    status: Literal["ok", "degraded"]
    version: str
    uptime_s: float
    running: int
    queue_depth: int
    models: list[ModelHealth]
