"""Layers: merges the values of several sources, and remembers for each leaf which source it came from.

Later calls take precedence. The result is plain data, of which `load` makes the frozen tree.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import inspect

from inferflux.config.env import MODEL_PATH, Setting, read_setting
from inferflux.config.schema import Key, fields, find, format_key, root, value_leaves
from inferflux.config.tree import DEMO_MODEL_ID, STUB
from inferflux.config.values import InvalidValueError, check
from inferflux.config.yaml_file import read_yaml
from inferflux.errors import ConfigError

DEFAULT_ORIGIN: Final = "default"


class Layers:
    """values: plain data. origins: the source of each leaf."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[Key, str] = {}

    def add_file(self, path: Path) -> None:
        """The first layer."""
        try:
            self.values = check(root(), read_yaml(path), ())
        except InvalidValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        self.origins = {key: str(path) for key, _ in value_leaves(root(), self.values) if key}

    def add_settings(self, settings: Iterable[Setting]) -> None:
        for setting in settings:
            self._set(setting)

    def set_model_path(self, path: str) -> None:
        """Gives the default model this path, adding a model when there is none."""
        models = self.values.setdefault("models", [])
        if not models:
            model_id = DEMO_MODEL_ID if path == STUB else _model_id(Path(path).resolve().name)
            models.append({"id": model_id, "default": True})
        index = next((index for index, model in enumerate(models) if model.get("default")), 0)
        self._set(read_setting(MODEL_PATH, ("models", index, "path"), path))
        for name in ("id", "default"):
            if ("models", index, name) not in self.origins and name in models[index]:
                self.origins["models", index, name] = MODEL_PATH

    def check_required(self) -> None:
        """Raises ConfigError if an element of a list lacks a required key, which any of the sources may give."""
        for key in [leaf for leaf, _ in value_leaves(root(), self.values)]:
            position = next((place for place, part in enumerate(key) if isinstance(part, int)), None)
            if position is not None:
                self._check_element(key[: position + 1])

    def _check_element(self, key: Key) -> None:
        section = find(key)
        assert isinstance(section, inspect.StructType)
        element = _get(self.values, key)
        for name, field in fields(section.cls).items():
            if field.required and name not in element:
                raise ConfigError(f"{find_origin(self.origins, key)}: {format_key((*key, name))}: is required")

    def _set(self, setting: Setting) -> None:
        self._container(setting)[setting.key[-1]] = setting.value
        for key in [key for key in self.origins if key[: len(setting.key)] == setting.key]:
            del self.origins[key]
        kind = find(setting.key)
        assert kind is not None
        self.origins[setting.key] = setting.origin
        for leaf, _ in value_leaves(kind, setting.value, setting.key):
            self.origins[leaf] = setting.origin

    def _container(self, setting: Setting) -> Any:
        """Returns the section or list that holds the setting's key, creating it if it is missing."""
        target: Any = self.values
        for place, part in enumerate(setting.key[:-1]):
            if isinstance(part, str):
                target = target.setdefault(part, [] if isinstance(setting.key[place + 1], int) else {})
                continue
            if part > len(target):
                name = format_key(setting.key[:place])
                raise ConfigError(f"{setting.origin}: {name}: has only {len(target)} elements")
            if part == len(target):
                target.append({})
            target = target[part]
        return target


def find_origin(origins: Mapping[Key, str], key: Key) -> str:
    """Returns the origin of `key`, else of the first value inside it, else of the list it is in, else "default"."""
    inside = (origin for leaf, origin in origins.items() if leaf[: len(key)] == key)
    origin = origins.get(key) or next(inside, None)
    if origin is None and key and isinstance(key[-1], int):
        return find_origin(origins, key[:-1])
    return origin or DEFAULT_ORIGIN


def _get(values: Any, key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


def _model_id(name: str) -> str:
    """Returns a model id made of a folder's name."""
    letters = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
    return letters.lstrip("._-")[:200] or "model"
