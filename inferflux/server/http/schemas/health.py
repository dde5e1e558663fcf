"""What the health routes answer."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


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
    """registry: whether the last edit of registry.yaml is in force; the administrators' routes say why not."""

    status: Literal["ok", "degraded"]
    version: str
    uptime_s: float
    queue: QueueHealth
    models: list[ModelHealth]
    registry: Literal["ok", "loading", "error"] | UnsetType = UNSET
