"""The admin routes for models: requests and answers."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from inferflux.config.tree import STUB, Dtype, Gigabytes, ModelBackend, ModelId, Positive, Quantization, Seconds, Text
from inferflux.errors import RequestError
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.models.events import ModelEvent
from inferflux.server.models.registry import RegistryStatus
from inferflux.server.models.wanted import Origin
from inferflux.server.policy.document import LoadedModel


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/admin/models. path may be left out for the demo model, backend `stub`. default: make it the default."""

    id: ModelId
    path: Text | None = None
    backend: ModelBackend = "auto"
    default: bool = False
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    max_model_len: Positive | None = None
    idle_unload_s: Seconds | None = None
    memory_gb: Gigabytes | None = None
    max_requests: Positive | None = None

    def model(self) -> LoadedModel:
        """Raises RequestError."""
        if self.path is None and self.backend != STUB:
            raise RequestError("path: is required, unless backend is stub", param="path")
        given = {name: getattr(self, name) for name in LoadedModel.__struct_fields__}
        return LoadedModel(**{**given, "path": self.path or STUB})


class UnloadRequest(msgspec.Struct, frozen=True):
    """DELETE /v1/admin/models. forget: not the model is to go, but what this API has decided about it."""

    id: ModelId
    forget: bool = False


class DefaultRequest(msgspec.Struct, frozen=True):
    """PUT /v1/admin/models/default. null: the default that the files say."""

    id: ModelId | None


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. pid: null without a process of its own. resident_bytes: main memory of that process."""

    state: str
    path: str
    pid: int | None
    requests: int
    resident_bytes: int | None


class AdminModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """origin: who asked for it: config, registry or api; null once nobody does. engines: what serves and, while the
    model is being replaced, what is loading or draining. load_s: seconds that the last load took. adapters: their
    ids."""

    id: str
    state: str
    default: bool
    origin: Origin | None
    path: str
    backend: str
    stub: bool
    max_model_len: int | None
    idle_unload_s: float | None
    requests: int
    load_s: float | None
    error: str | None
    adapters: tuple[str, ...]
    engines: list[EngineCard]


class AdminModelList(msgspec.Struct, frozen=True, kw_only=True):
    """unloaded: ids that a file asks for and the API has unloaded. registry: null without registry.path. events: the
    latest, oldest first."""

    data: list[AdminModelCard]
    default: str | None
    unloaded: tuple[str, ...]
    registry: RegistryStatus | None
    events: list[ModelEvent]
    object: Literal["list"] = "list"


class Unloaded(msgspec.Struct, frozen=True):
    """state: draining while requests still use it, then unloaded."""

    id: str
    state: Literal["draining", "unloaded"]
    deleted: Literal[True] = True


class Forgotten(msgspec.Struct, frozen=True):
    """state: of the model that the files say, or of the one that leaves. origin: who asks for it now; null: nobody."""

    id: str
    state: str
    origin: Origin | None


class Default(msgspec.Struct, frozen=True):
    id: Annotated[str, Meta(min_length=1)] | None


LOAD = BodyReader(LoadRequest)
UNLOAD = BodyReader(UnloadRequest)
DEFAULT = BodyReader(DefaultRequest)
