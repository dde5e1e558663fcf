"""Typed, range-checked access to a JSON object of a model folder.

Knows types and ranges; knows no key by name. Every mistake is a ModelLoadError that names the file and the key.
"""

import json
from collections.abc import Iterator, Mapping
from typing import cast

from inferflux.errors import ModelLoadError, did_you_mean

_MISSING = object()


class ConfigReader:
    """One JSON object. `where` is its file, with the key path when it is nested; `defaults` fill missing keys.

    A key that is null counts as missing for the `optional_` methods, and as wrong for the others.
    """

    def __init__(self, values: Mapping[str, object], where: str, defaults: Mapping[str, object] | None = None) -> None:
        self.where = where
        self._values = {**(defaults or {}), **values}

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def fail(self, key: str, accepted: str) -> ModelLoadError:
        """Returns the error for `key`; `accepted` says what it must be."""
        value = self._values.get(key, _MISSING)
        got = "missing" if value is _MISSING else f"got {json.dumps(value, default=str):.60}"
        return ModelLoadError(f"{self.where}: {key}: must be {accepted} ({got})")

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._values.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"an integer >= {low} and <= {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return self.integer(key, low, high) if key in self else None

    def number(self, key: str, low: float, high: float) -> float:
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fail(key, f"a number >= {low:g} and <= {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return self.number(key, low, high) if key in self else None

    def flag(self, key: str) -> bool:
        """A missing key is false."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return bool(value)

    def choice(self, key: str, choices: Mapping[str, str]) -> str:
        """Returns what `choices` has for the key's word."""
        value = self._values.get(key)
        if not isinstance(value, str) or value not in choices:
            hint = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise self.fail(key, f"one of {', '.join(choices)}{hint}")
        return choices[value]

    def strings(self, key: str) -> tuple[str, ...]:
        """A missing key is an empty tuple."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "a list of strings")
        return tuple(value)

    def numbers(self, key: str, length: int, low: float, high: float) -> tuple[float, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) != length or not all(_in_range(x, low, high) for x in value):
            raise self.fail(key, f"a list of {length} numbers >= {low:g} and <= {high:g}")
        return tuple(float(item) for item in value)

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers; a missing key is an empty tuple."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int and low <= item <= high for item in value):
            raise self.fail(key, f"a list of integers >= {low} and <= {high}")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids; a missing key is an empty tuple."""
        value = self._values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item < 2**31 for item in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return tuple(dict.fromkeys(cast(list[int], ids)))

    def with_defaults(self, defaults: Mapping[str, object]) -> "ConfigReader":
        return ConfigReader(self._values, self.where, defaults)

    def section(self, key: str, defaults: Mapping[str, object] | None = None) -> "ConfigReader":
        """The object under `key`; a missing key is an empty object."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "an object")
        return ConfigReader(value or {}, f"{self.where}: {key}", defaults)


def _in_range(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
