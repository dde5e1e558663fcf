"""Which folder a configured model is loaded from: its own, or the demo model's when it has none.

Knows paths; loads nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from inferflux.config import Config, ModelConfig
from inferflux.engine.demo import STUB, demo_model_path
from inferflux.errors import ConfigError

DEMO_MODEL_ID = "inferflux-demo"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """model: the configuration to load, with a path that exists. fallback: why the demo model stands in for the one
    that was asked for; None when nothing was missing. stub: it is the demo model."""

    model: ModelConfig
    stub: bool
    fallback: str | None = None


def find_sources(config: Config) -> list[ModelSource]:
    """Returns what to load, in the configuration's order; the demo model when no model is configured.

    Raises ConfigError when a model's folder is missing and the demo model may not stand in for it.
    """
    allow_stub = config.runtime.allow_stub
    if not config.models:
        if not allow_stub:
            raise ConfigError("models: at least one is needed when runtime.allow_stub is false")
        return [_demo(ModelConfig(id=DEMO_MODEL_ID, path=STUB, default=True), None)]
    return [find_source(model, allow_stub) for model in config.models]


def find_source(model: ModelConfig, allow_stub: bool) -> ModelSource:
    """Returns where to load one model from. Raises ConfigError as `find_sources` does."""
    if STUB in (model.path, model.backend):
        return _demo(model, None)
    if model.path is not None and Path(model.path).is_dir():
        return ModelSource(model, stub=False)
    missing = f"{model.path} is not a folder" if model.path is not None else "no path is configured"
    if not allow_stub:
        raise ConfigError(f"models: {model.id}: {missing}, and runtime.allow_stub is false")
    return _demo(model, missing)


def _demo(model: ModelConfig, fallback: str | None) -> ModelSource:
    """What was set for the weights that are missing (dtype, window, template) does not fit the demo model's."""
    backend = "auto" if model.backend == STUB else model.backend
    stand_in = msgspec.structs.replace(model, path=str(demo_model_path()), backend=backend)
    if fallback is not None:
        stand_in = msgspec.structs.replace(stand_in, dtype="auto", max_model_len=None, chat_template=None)
    return ModelSource(stand_in, stub=True, fallback=fallback)
