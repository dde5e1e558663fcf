"""registry.yaml: which models to serve, `models` as in the configuration and nothing else.

Checked whole: text in, all models out or a ConfigError that names the key at fault. Opens no file.
"""

from collections.abc import Collection
from typing import Any

import msgspec
from msgspec import inspect

from inferflux.config import checks
from inferflux.config.schema import fields, format_key
from inferflux.config.tree import STUB, Config, ModelConfig, Section
from inferflux.config.values import InvalidValueError, check
from inferflux.config.yaml_file import parse_yaml
from inferflux.errors import ConfigError


class RegistryFile(Section, frozen=True):
    models: tuple[ModelConfig, ...]


def parse_registry(text: str, taken: Collection[str] = ()) -> tuple[ModelConfig, ...]:
    """Returns the models in the file's order. taken: ids that are adapters'. Raises ConfigError.

    An empty file is refused, as one that is being written looks the same: `models: []` serves none.
    """
    kind = inspect.type_info(RegistryFile)
    assert isinstance(kind, inspect.StructType)
    try:
        values = check(kind, parse_yaml(text), ())
    except InvalidValueError as error:
        raise ConfigError(str(error)) from None
    if values.get("models") is None:
        raise ConfigError("models: is required (models: [] serves none)")
    _check_elements(values)
    models = msgspec.convert(values, RegistryFile).models
    for fault in checks.faults(Config(models=models)):
        raise ConfigError(f"{format_key(fault.keys[0])}: {fault.message}")
    for index, model in enumerate(models):
        if model.id in taken:
            raise ConfigError(f'models[{index}].id: must not be an adapter\'s (got "{model.id}", see adapters[])')
    return models


def _check_elements(values: dict[str, Any]) -> None:
    """What must be given."""
    for index, element in enumerate(values["models"]):
        for name, field in fields(ModelConfig).items():
            if field.required and name not in element:
                raise ConfigError(f"{format_key(('models', index, name))}: is required")
        if element.get("path") is None and element.get("backend") != STUB:
            raise ConfigError(f"models[{index}].path: is required, unless backend is {STUB}")
