"""GET /v1/models and /v1/models/{id}: what is said of a model."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """backend: what computes it (cpu, cuda), or what was asked for while it is not loaded; `stub` says whether it is
    the demo model. max_model_len: its window in tokens, null before it is loaded. parent: of an adapter alone, the
    model that it adapts, whose state and window are its own."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "inferflux"
    backend: str
    state: str
    default: bool
    stub: bool
    max_model_len: int | None
    parent: str | UnsetType = UNSET


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"
