"""The effective configuration for people and for programs: every value with its origin, secrets masked."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from inferflux.config.load import LoadedConfig
from inferflux.config.schema import find, format_key, is_secret, root, value_leaves
from inferflux.log import MASK, mask_secrets


class Shown(NamedTuple):
    """One line of the listing: `server.http_port`, 8081, `--port`."""

    key: str
    value: Any
    origin: str


def shown_values(loaded: LoadedConfig) -> Iterator[Shown]:
    """Yields every key in the tree's order with its effective value; secrets and credentials in URLs are masked."""
    for key, value in value_leaves(root(), msgspec.to_builtins(loaded.config)):
        kind = find(key)
        assert kind is not None
        masked = MASK if value is not None and is_secret(kind) and value != () else _masked(value)
        yield Shown(format_key(key), masked, loaded.origin(key))


def as_text(loaded: LoadedConfig) -> str:
    """Three columns: key, value, origin."""
    rows = [(shown.key, _plain(shown.value), shown.origin) for shown in shown_values(loaded)]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))
    return "\n".join(f"{key:{key_width}}  {value:{value_width}}  {origin}" for key, value, origin in rows)


def as_json(loaded: LoadedConfig) -> str:
    """`{"server.http_port": {"value": 8081, "origin": "--port"}, ...}`."""
    shown = {entry.key: {"value": entry.value, "origin": entry.origin} for entry in shown_values(loaded)}
    return json.dumps(shown, indent=2)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value


def _plain(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[\w./:@*-]+", value, re.ASCII):
        return value
    return json.dumps(value)
