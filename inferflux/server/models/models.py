"""Everything about the served models, put together: the engines, the way they change, the registry, what happened."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inferflux.config import Config
from inferflux.config.values import InvalidValueError
from inferflux.config.yaml_file import read_text
from inferflux.errors import ConfigError
from inferflux.server.backends import Backend, BackendManager
from inferflux.server.backends.manager import OnEvent
from inferflux.server.model_source import ModelSource
from inferflux.server.models.control import ModelControl
from inferflux.server.models.events import ModelEvents
from inferflux.server.models.registry import ModelRegistry
from inferflux.server.policy.store import PolicyStore

MakeManager = Callable[[Sequence[ModelSource], OnEvent], BackendManager]


@dataclass(frozen=True)
class Models:
    """registry: None where the configuration names no file to follow."""

    control: ModelControl
    events: ModelEvents
    registry: ModelRegistry | None

    @property
    def backends(self) -> BackendManager:
        return self.control.manager

    async def run(self) -> None:
        """Follows the registry and keeps house until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.backends.run_maintenance())
            if self.registry is not None:
                group.create_task(self.registry.run(self.control.follow))


def open_models(config: Config, policy: PolicyStore, events: ModelEvents, make_manager: MakeManager) -> Models:
    """Returns the models as configuration, registry and policy store want them, not loaded yet. Reads the registry.

    Raises ConfigError for a configured model that cannot be served; a registry that is unfit is told, and tried again.
    """
    registry = _registry(config, events)
    registered = registry.first() if registry is not None else ()

    def note(backend: Backend, event: str) -> None:
        is_load = event in ("loaded", "failed")
        detail = backend.error if event == "failed" else None
        events.add(event, backend.id, detail=detail, load_s=backend.load_s if is_load else None)

    control = ModelControl(config, policy, registered, lambda sources: make_manager(sources, note))
    return Models(control, events, registry)


def _registry(config: Config, events: ModelEvents) -> ModelRegistry | None:
    path = config.registry.path
    if path is None:
        return None
    interval_s = config.registry.poll_interval_ms / 1000
    read, taken = partial(_read, Path(path)), frozenset(adapter.id for adapter in config.adapters)
    return ModelRegistry(path, read, events, interval_s=interval_s, clock=time.monotonic, taken=taken)


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except InvalidValueError as error:
        raise ConfigError(str(error)) from None
