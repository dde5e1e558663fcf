"""Which folder a configured model is loaded from: its own, or the demo model's when it has none.

Knows paths; loads nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from inferflux.config import Config, ModelConfig
from inferflux.config.tree import DEMO_MODEL_ID, STUB, AdapterConfig
from inferflux.engine.demo import demo_model_path
from inferflux.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelSource:
    """model: the configuration to load, with a path that exists. fallback: why the demo model stands in for the one
    that was asked for; None when nothing was missing. stub: it is the demo model. adapters: those to load with it."""

    model: ModelConfig
    stub: bool
    fallback: str | None = None
    adapters: tuple[AdapterConfig, ...] = ()


def configured_models(config: Config) -> Sequence[ModelConfig]:
    """Returns the configuration's models; the demo model when there is none and no registry to name some.

    Raises ConfigError when there is none and the demo model may not stand in.
    """
    if config.models or config.registry.path is not None:
        return config.models
    if not config.runtime.allow_stub:
        raise ConfigError("models: at least one is needed when runtime.allow_stub is false")
    return [ModelConfig(id=DEMO_MODEL_ID, path=STUB, default=True)]


def find_sources(config: Config) -> list[ModelSource]:
    """Returns what to load, in the configuration's order. Raises ConfigError when a model's folder is missing and the
    demo model may not stand in for it."""
    sources = (find_source(model, config.runtime.allow_stub) for model in configured_models(config))
    return [with_adapters(source, config.adapters) for source in sources]


def find_source(model: ModelConfig, allow_stub: bool) -> ModelSource:
    """Returns where to load one model from. Raises ConfigError as `find_sources` does."""
    if _is_stub(model) or _is_folder(model):
        return named_source(model)
    missing = _missing(model)
    if not allow_stub:
        raise ConfigError(f"models: {model.id}: {missing}, and runtime.allow_stub is false")
    return _demo(model, missing)


def with_adapters(source: ModelSource, adapters: Sequence[AdapterConfig]) -> ModelSource:
    """Returns the source with those of the adapters that are made for its model. A demo model that stands in for it has
    no use for them."""
    own = tuple(adapter for adapter in adapters if adapter.base == source.model.id)
    if own and source.fallback is not None:
        names = ", ".join(adapter.id for adapter in own)
        return replace(source, fallback=f"{source.fallback}, and its adapters ({names}) are not served")
    return replace(source, adapters=own)


def require_adapters(config: Config) -> None:
    """Raises ConfigError when an adapter's folder is missing."""
    for index, adapter in enumerate(config.adapters):
        if not Path(adapter.path).is_dir():
            raise ConfigError(f'adapters[{index}].path: must be a folder (got "{adapter.path}", which is none)')


def require_source(model: ModelConfig) -> ModelSource:
    """Returns where to load one model from; nothing stands in for it. Raises ConfigError when its folder is missing."""
    if _is_stub(model) or _is_folder(model):
        return named_source(model)
    raise ConfigError(f"{model.id}: {_missing(model)}")


def named_source(model: ModelConfig) -> ModelSource:
    """Returns the source that a model names, whether its folder is there or not."""
    return _demo(model, None) if _is_stub(model) else ModelSource(model, stub=False)


def _is_stub(model: ModelConfig) -> bool:
    return STUB in (model.path, model.backend)


def _is_folder(model: ModelConfig) -> bool:
    return model.path is not None and Path(model.path).is_dir()


def _missing(model: ModelConfig) -> str:
    return f"{model.path} is not a folder" if model.path is not None else "no path is configured"


def _demo(model: ModelConfig, fallback: str | None) -> ModelSource:
    """What was set for the weights that are missing (dtype, window, template) does not fit the demo model's."""
    backend = "auto" if model.backend == STUB else model.backend
    stand_in = msgspec.structs.replace(model, path=str(demo_model_path()), backend=backend)
    if fallback is not None:
        stand_in = msgspec.structs.replace(stand_in, dtype="auto", max_model_len=None, chat_template=None)
    return ModelSource(stand_in, stub=True, fallback=fallback)
