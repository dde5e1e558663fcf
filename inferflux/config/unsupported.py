"""Keys the tree knows and this version does not act on yet. Setting one is refused rather than ignored.

A feature that arrives deletes its names here, and nothing else needs to know.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from msgspec import NODEFAULT

from inferflux.config.schema import ANY_INDEX, Key, default_of, format_key, schema_leaves

UNSUPPORTED: Final = ("adapters",)
"""Refused unless at its default; the name of a list refuses every key in it."""


def refused(leaves: Mapping[Key, Any]) -> Iterator[Key]:
    """Yields the keys among `leaves` (plain values by key) whose value asks for something not built yet."""
    defaults = {format_key(key): default_of(field) for key, field in schema_leaves()}
    for key, value in leaves.items():
        name = format_key(tuple(ANY_INDEX if isinstance(part, int) else part for part in key))
        if len(key) > 1 and str(key[0]) in UNSUPPORTED:
            yield key[:1]
        elif name in UNSUPPORTED and _differs(value, defaults.get(name, ())):
            yield key


def _differs(value: Any, default: Any) -> bool:
    return default is NODEFAULT or value != (list(default) if isinstance(default, tuple) else default)
