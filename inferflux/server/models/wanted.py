"""Which models are wanted: the configuration's, over them the registry's, over them what came by the admin API.

An id that several name is the last one's. Pure functions; loads nothing and looks at no folder.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from inferflux.config import ModelConfig
from inferflux.server.policy.document import LoadedModel, ModelChanges

Origin = Literal["config", "registry", "api"]


@dataclass(frozen=True, slots=True)
class WantedModel:
    """model: what to load, without a word on who is the default. origin: who asked for it."""

    model: ModelConfig
    origin: Origin


@dataclass(frozen=True, slots=True)
class ModelSet:
    """models: by id, in order. default: the one for requests that name none; None when there is no model."""

    models: Mapping[str, WantedModel]
    default: str | None


def merge(configured: Sequence[ModelConfig], registered: Sequence[ModelConfig], changes: ModelChanges) -> ModelSet:
    """Returns what is wanted. The default is the API's, else the registry's, else the configuration's, else the first;
    one that is not among the models is passed over."""
    loaded = [_model_of(one) for one in changes.loaded]
    layers: tuple[tuple[Origin, Sequence[ModelConfig]], ...] = (
        ("config", configured),
        ("registry", registered),
        ("api", loaded),
    )
    models = {
        model.id: WantedModel(msgspec.structs.replace(model, default=False), origin)
        for origin, layer in layers
        for model in layer
        if origin == "api" or model.id not in changes.unloaded
    }
    preferred = (changes.default, *_defaults(registered), *_defaults(configured), *models)
    return ModelSet(models, next((one for one in preferred if one in models), None))


def with_loaded(changes: ModelChanges, model: LoadedModel, *, default: bool) -> ModelChanges:
    """Returns the changes with this model loaded, in place of one of its id."""
    loaded = tuple(one for one in changes.loaded if one.id != model.id)
    return ModelChanges(
        loaded=(*loaded, model),
        unloaded=tuple(one for one in changes.unloaded if one != model.id),
        default=model.id if default else changes.default,
    )


def with_unloaded(changes: ModelChanges, model_id: str, base: Iterable[str]) -> ModelChanges:
    """Returns the changes without this model. base: ids that the files ask for; only these need to be kept away."""
    unloaded = tuple(one for one in changes.unloaded if one != model_id)
    return ModelChanges(
        loaded=tuple(one for one in changes.loaded if one.id != model_id),
        unloaded=(*unloaded, model_id) if model_id in base else unloaded,
        default=None if changes.default == model_id else changes.default,
    )


def without(changes: ModelChanges, model_id: str) -> ModelChanges:
    """Returns the changes with nothing said of this model; which one is the default is another matter."""
    return ModelChanges(
        loaded=tuple(one for one in changes.loaded if one.id != model_id),
        unloaded=tuple(one for one in changes.unloaded if one != model_id),
        default=changes.default,
    )


def _model_of(loaded: LoadedModel) -> ModelConfig:
    return ModelConfig(**msgspec.structs.asdict(loaded))


def _defaults(models: Iterable[ModelConfig]) -> Iterable[str]:
    return (model.id for model in models if model.default)
