"""Writes docs/ConfigReference.md from the tree: `python -m inferflux.config.reference > docs/ConfigReference.md`."""

import json
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from msgspec import NODEFAULT, inspect

from inferflux.config.descriptions import DESCRIPTIONS
from inferflux.config.env import MODEL_PATH, SHORT_NAMES, TORCHRUN_NAMES
from inferflux.config.passphrase import PASSPHRASE_VARIABLE
from inferflux.config.schema import Key, core, default_of, format_key, schema_leaves
from inferflux.config.tree import MAX_INTEGER

_INTRODUCTION: Final = """# Configuration reference

Made from the code by `python -m inferflux.config.reference`; do not edit.

A value is taken from the command line, else from the environment, else from the YAML file, else it is the default.
`inferflux config show` prints each effective value with its origin, `inferflux config check FILE` checks a file.
An unknown key, a wrong type or a value out of range stops the start with exit code 2 and one line that says
where and what is accepted. YAML is read as YAML 1.2: booleans are `true` and `false`.

Every key is also an environment variable: `INFERFLUX_`, then its path in upper case joined by `__`. An empty variable
counts as unset. Integers are at most 2147483647. Lists are separated by commas or JSON, lists of sections and mappings
are JSON, `null` is none; an element of a list has its index in the name (`INFERFLUX_MODELS__0__PATH`).

Without any model and without `registry.path` the demo model is served, unless `runtime.allow_stub` is false. Paths are
relative to the working directory.
"""

_BOUNDS: Final = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
_NAMES: Final[Mapping[type, str]] = MappingProxyType(
    {
        inspect.BoolType: "boolean",
        inspect.IntType: "integer",
        inspect.FloatType: "number",
        inspect.StrType: "text",
    }
)


def markdown() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *_sections(), *_short_names()]) + "\n"


def _sections() -> Iterator[str]:
    sections: dict[Key, list[tuple[Key, inspect.Field]]] = {}
    for key, field in schema_leaves():
        sections.setdefault(key[:-1], []).append((key, field))
    for section, leaves in sections.items():
        yield f"## {format_key(section)}\n"
        yield "| Key | Accepted | Default | |\n| --- | --- | --- | --- |"
        for key, field in leaves:
            name = format_key(key)
            yield f"| `{name}` | {_accepted(field.type)} | {_default(default_of(field))} | {DESCRIPTIONS[name]} |"
        yield ""


def _short_names() -> Iterator[str]:
    yield "## Environment variables with short names\n"
    yield "| Variable | Key |\n| --- | --- |"
    yield f"| `{MODEL_PATH}` | `models[].path` of the default model |"
    for name, key in {**SHORT_NAMES, **TORCHRUN_NAMES}.items():
        yield f"| `{name}` | `{format_key(key)}` |"
    yield f"| `{PASSPHRASE_VARIABLE}` | no key: the passphrase of the policy store is never in a file |"
    yield "\n`INFERFLUX_API_KEYS` is written `key:scope+scope,key2:scope`; a key without scopes gets the default ones."
    yield "A short name yields to the full one. torchrun's names yield to ours."


def _accepted(kind: inspect.Type) -> str:
    inner = core(kind)
    if isinstance(inner, inspect.LiteralType):
        text = ", ".join(f"`{value}`" for value in inner.values)
    elif isinstance(inner, inspect.VarTupleType):
        text = f"list of {_accepted(inner.item_type)}"
    elif isinstance(inner, inspect.DictType):
        text = f"mapping to {_accepted(inner.value_type)}"
    else:
        text = _NAMES[type(inner)] + _range(inner)
    return f"{text} or null" if isinstance(kind, inspect.UnionType) else text


def _range(inner: Any) -> str:
    bounds = [(sign, getattr(inner, name, None)) for name, sign in _BOUNDS]
    return "".join(f" {sign} {bound}" for sign, bound in bounds if bound is not None and bound != MAX_INTEGER)


def _default(value: Any) -> str:
    return "required" if value is NODEFAULT else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(markdown())
